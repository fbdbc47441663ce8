"""Image files of any mode as 8-bit RGB pictures."""

from PIL import Image, ImageOps


def upright_rgb(picture: Image.Image) -> Image.Image:
    """What a person sees in an image file: turned as its EXIF data says, transparent pixels over white, 8-bit RGB.

    16-bit grey is scaled to 8 bits; Pillow's own conversion would clip it to white. Raises ValueError for
    floating-point pixels, whose range nobody knows.
    """
    if picture.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = picture.point(lambda value: value / 257, "L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
