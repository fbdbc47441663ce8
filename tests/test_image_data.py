"""Pictures with captions in every form, their cached latents, and the samples that training draws from them."""

import io
import os
import shutil
import threading
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms.functional import center_crop, resize

from textcraftor import image_data, latent_cache
from textcraftor.errors import UserError
from textcraftor.image_data import direct_batch, share_pictures
from textcraftor.image_formats import check_images, decode_picture, open_pictures, read_pairs
from textcraftor.latent_cache import Latents, encode_pictures
from textcraftor.sampling import prompt_noise

SIZE = (64, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTCRAFTOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def vae():
    return tiny.seeded(7, tiny.make_vae).eval().requires_grad_(False)


def picture(seed, size=(80, 70)):
    """Smooth noise of width and height `size`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def save(folder, **captions):
    """Pictures a.png, b.png, ..., each different, with a caption in a text file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, caption) in enumerate(captions.items()):
        (folder / f"{name}.png").write_bytes(encoded(picture(seed)))
        (folder / f"{name}.txt").write_text(caption)
    return folder


def found(path):
    """What a path holds: {picture's name: caption}, {name of what is left out: reason}; check_images agrees."""
    check_images(path)
    pairs, skipped = read_pairs(path)
    names = {f"{Path(pair.file).name}{'' if pair.row is None else pair.row}": pair.caption for pair in pairs}
    assert len(names) == len(pairs)
    return names, {Path(name).name: reason for name, reason in skipped}


def refusal(path):
    messages = []
    for function in (check_images, read_pairs):
        with pytest.raises(UserError) as error:
            function(path)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and path.name in messages[0] and "\n" not in messages[0]
    return messages[0]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_an_image_folder_with_metadata(tmp_path, suffix):
    """Nested, with names in any alphabet and either Unicode form, captions of any kind, and what is missing, named."""
    accented = unicodedata.normalize("NFD", "é.PNG")  # as macOS writes it; the metadata has the other form
    for name in ("0.png", accented, "below/狐 2.jpeg", "quiet.png", "extra.webp", "._0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(0)))
    names = ["0.png", "é.PNG", "below/狐 2.jpeg", "quiet.png", "lost.png", "", "below\\狐 2.jpeg"]
    texts = ["a cat, seen\nfrom above", ' "so", he said ', "une forêt", "", "a dog", "nothing", "a second caption"]
    table = pd.DataFrame({"id": range(7), "File_Name": names, "seed": range(7), "Caption": texts})
    path = tmp_path / f"Metadata.{suffix}"
    if suffix == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        {"csv": table.to_csv, "parquet": table.to_parquet}[suffix](path, index=False)
    if suffix == "csv":
        path.write_text("\ufeff" + path.read_text() + "7,a.png\n")
    names = ["0.png", accented, "狐 2.jpeg", "狐 2.jpeg"]
    captions = ["a cat, seen\nfrom above", '"so", he said', "une forêt", "a second caption"]
    check_images(tmp_path)
    for source in (tmp_path, path):  # the folder, or the table itself
        pairs, skipped = read_pairs(source)
        assert [(Path(pair.file).name, pair.caption) for pair in pairs] == list(zip(names, captions, strict=True))
        reasons = Counter(reason for _, reason in skipped)
        assert reasons["no such file"] == 1 and reasons["no caption"] == (2 if source == tmp_path else 1)
        assert reasons["no file name"] == (2 if suffix == "csv" else 1)
        assert any(name.endswith("lost.png") for name, _ in skipped)


def test_pictures_with_text_files_beside_them(tmp_path):
    save(tmp_path / "a folder", a="a cat", b="  two\nlines  ", c="")
    save(tmp_path / "a folder" / "below" / "deeper", d="a dog")
    (tmp_path / "a folder" / "UPPER.v1.JPG").write_bytes(b"")
    (tmp_path / "a folder" / "UPPER.v1.TXT").write_bytes("\ufeffé".encode())
    links = pa.table({"url": ["http://a.b/c.jpg"], "caption": ["a cat"], "key": ["a"]})  # as img2dataset leaves them
    pyarrow.parquet.write_table(links, tmp_path / "a folder" / "00000.parquet")
    (tmp_path / "a folder" / "alone.png").write_bytes(b"")
    (tmp_path / "a folder" / "latin.png").write_bytes(b"")
    (tmp_path / "a folder" / "latin.txt").write_bytes(b"caf\xe9")
    os.symlink(tmp_path / "a folder", tmp_path / "a folder" / "below" / "loop")
    names, skipped = found(tmp_path)
    assert names == {"a.png": "a cat", "b.png": "two lines", "d.png": "a dog", "UPPER.v1.JPG": "é"}
    assert skipped.keys() == {"c.png", "alone.png", "latin.png"} and "latin.txt" in skipped["latin.png"]


def test_parquet_files_with_pictures_inside(tmp_path):
    """As `datasets` writes them, in several files and row groups, also with a path in place of the bytes."""
    files = [encoded(picture(seed)) for seed in range(5)]
    save(tmp_path / "data", beside="")
    (tmp_path / "data" / "beside.txt").unlink()
    rows = [{"bytes": data, "path": None} for data in files[:4]]
    rows += [{"bytes": None, "path": "beside.png"}, {"bytes": None, "path": None}]
    captions = ["0", "a cat", None, "a dog", "an owl", "a fox"]
    table = pa.table({"url": ["http://a.b/c"] * 6, "image": rows, "TEXT": captions})
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train-00000.parquet", row_group_size=2)
    plain = pa.table({"jpg": files[2:4], "thumbnail": [b"1", b"2"], "blip_caption": ["a hen", "a bee"]})
    pyarrow.parquet.write_table(plain, tmp_path / "data" / "train-00001.PARQUET")
    names, skipped = found(tmp_path)
    numbers = {"train-00000.parquet": [0, 1, 3, 4, 5], "train-00001.PARQUET": [0, 1]}
    assert list(names) == [f"{name}{row}" for name, rows in numbers.items() for row in rows]
    assert list(names.values()) == ["0", "a cat", "a dog", "an owl", "a fox", "a hen", "a bee"]
    assert skipped == {"train-00000.parquet, row 3": "no caption"}
    pairs, _ = read_pairs(tmp_path)
    reads = list(open_pictures(pairs))
    expected = [files[0], files[1], files[3], (tmp_path / "data" / "beside.png").read_bytes(), None, *files[2:4]]
    for read, data in zip(reads, expected, strict=True):
        if data:
            assert read() == data
        else:
            with pytest.raises(ValueError, match="empty"):
                read()
    assert [read() for read in open_pictures([pairs[2], pairs[6]])] == [files[3], files[3]]  # only the missing ones


def test_what_holds_no_pictures_is_refused_in_one_line(tmp_path):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file.replace("_", ".", 1)).write_bytes(content)
        return tmp_path / name

    urls = pa.table({"URL": ["http://a.b/c.jpg"], "TEXT": ["a cat"]})
    pyarrow.parquet.write_table(urls, folder("links") / "part-0.parquet")
    two = pa.table({"front": [b"1"], "back": [b"2"], "text": ["a cat"]})
    pyarrow.parquet.write_table(two, folder("two") / "part-0.parquet")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    cases = {
        tmp_path / "nowhere": "no such folder",
        folder("empty"): "no usable picture",
        folder("archives", shard_tar=b"", shard_txt=b"a"): "expected a folder of pictures",
        folder("bare", a_png=b"", b_jpg=b""): "no caption 2",
        folder("lost", metadata_csv=b"file_name,text\na.png,a cat\n"): "no such file 1",
        folder("nameless", metadata_csv=b"id,text\n1,a cat\n"): "no column `file_name`",
        folder("mute", metadata_jsonl=b'{"file_name": "a.png", "label": 3}\n'): "cannot tell which column",
        folder("both", metadata_csv=b"", metadata_jsonl=b""): "keep the one",
        folder("pointer", metadata_jsonl=pointer): "git lfs pull",
        folder("cut", train_parquet=b"PAR1" + bytes(20)): "not a readable parquet file",
        folder("other", train_parquet=b"a cat"): "not a parquet file",
        tmp_path / "links": "`URL`",
        tmp_path / "two": "front, back",
    }
    (tmp_path / "shard.tar").write_bytes(b"")
    cases[tmp_path / "shard.tar"] = ".tar file"
    for path, words in cases.items():
        assert words in refusal(path), path


def test_every_mode_becomes_upright_rgb_of_the_models_size():
    """Compared with the same picture in plain RGB; the size, with torchvision's resize and centre crop."""
    scene = picture(1, (160, 128))
    plain = np.asarray(decode_picture(encoded(scene), *SIZE)).astype(float)
    crop = center_crop(resize(scene, 64, antialias=True), list(SIZE))
    assert plain.shape == (64, 64, 3) and np.abs(plain - np.asarray(crop)).mean() < 2

    turned, cmyk, palette = Image.Exif(), scene.convert("CMYK"), scene.quantize(64)
    turned[0x0112] = 6  # the camera was held on its side
    clear = Image.merge("RGBA", [*scene.split(), Image.new("L", scene.size, 0)])
    deep = Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257)
    files = {
        "rotated": (encoded(scene.rotate(90, expand=True), exif=turned), scene, 0),
        "CMYK": (encoded(cmyk, "JPEG", quality=95), scene, 4),
        "palette": (encoded(palette, "GIF"), palette.convert("RGB"), 0),
        "opaque": (encoded(scene.convert("RGBA"), "WEBP", lossless=True), scene, 0),
        "transparent": (encoded(clear), Image.new("RGB", scene.size, "white"), 0),
        "16 bits": (encoded(deep), scene.convert("L").convert("RGB"), 0),
        "bilevel": (encoded(scene.convert("1"), "TIFF"), scene.convert("1").convert("RGB"), 0),
    }
    for name, (data, same, tolerance) in files.items():
        expected = np.asarray(decode_picture(encoded(same), *SIZE)).astype(float)
        assert np.abs(np.asarray(decode_picture(data, *SIZE)) - expected).mean() <= tolerance, name
    for size in ((1, 500), (500, 1), (7, 9), (64, 64)):
        assert decode_picture(encoded(picture(0, size)), 64, 48).size == (48, 64)
    broken = {b"": "no picture", encoded(scene)[:900]: "truncated|broken", b"<html>404": "web page", b"II*\0": "."}
    broken[encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")] = "floating-point"
    for data, words in broken.items():
        with pytest.raises(ValueError, match=words):
            decode_picture(data, *SIZE)


def test_latents_are_those_of_the_vae(tmp_path, vae):
    assert latent_cache.picture_size(vae, (4, 8, 12)) == (64, 96)
    save(tmp_path / "in", a="a cat", b="a dog", c="an owl", d="twice")
    shutil.copy(tmp_path / "in" / "a.png", tmp_path / "in" / "d.png")
    (tmp_path / "in" / "b.png").write_bytes(encoded(picture(1))[:300])
    pairs, _ = read_pairs(tmp_path / "in")
    result = encode_pictures(vae, pairs, *SIZE, progress=False)
    assert result.kept == [0, 2, 3] and result.new == 2 and result.places[0].tolist() == result.places[2].tolist()
    assert [Path(name).name for name, _ in result.skipped] == ["b.png"]
    latents = Latents(result.files, result.places)
    for number, seed in enumerate((0, 2, 0)):
        pixels = np.asarray(decode_picture(encoded(picture(seed)), *SIZE))
        images = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None].float()
        expected = vae.encode(images).latent_dist
        for value, wanted in zip(latents[number], (expected.mean[0], expected.std[0]), strict=True):
            assert value.shape == (4, 8, 8) and value.dtype == torch.float32
            torch.testing.assert_close(value, wanted, rtol=2**-10, atol=1e-5)


def test_the_cache_is_reused_until_something_changes(tmp_path, vae, cache, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD", 2)
    folder = save(tmp_path / "in", a="a cat", b="a dog", c="an owl", d="a fox", e="a hen")

    def new(network=vae, size=SIZE):
        result = encode_pictures(network, read_pairs(folder)[0], *size, progress=False)
        latents = Latents(result.files, result.places)
        return result.new, [torch.stack(latents[number]) for number in range(len(latents))]

    count, first = new()
    assert count == 5 and new()[0] == 0
    (folder / "e.png").rename(folder / "0.png")  # names, places and captions do not matter
    (folder / "0.txt").write_text("another caption")
    count, moved = new()
    assert count == 0 and torch.equal(moved[0], first[4]) and torch.equal(moved[1], first[0])

    before = sum(file.stat().st_size for file in cache.rglob("*.safetensors"))
    (folder / "c.png").write_bytes(encoded(picture(99)))
    assert new()[0] == 1
    other = tiny.seeded(8, tiny.make_vae).eval()
    assert new(other)[0] == new(size=(64, 80))[0] == 5
    assert new(other)[0] == new()[0] == 0 and before > 0

    # A flipped bit, a file cut off, one that is something else: its pictures are encoded again, to the same values.
    _, good = new()
    vae_folder = latent_cache.cache_folder(vae, *SIZE)
    for damage in (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], lambda data: data[:50], lambda _: b"{}"):
        shard = Path(encode_pictures(vae, read_pairs(folder)[0], *SIZE, progress=False).files[0])
        shard.write_bytes(damage(shard.read_bytes()))
        count, again = new()
        assert 1 <= count <= 2
        for value, wanted in zip(
            again, good, strict=True
        ):  # kept in fp16; in another batch fp32's last bits may differ
            torch.testing.assert_close(value, wanted, rtol=2**-10, atol=1e-5)
    assert new()[0] == 0

    # Interrupted after the first shard, the second start goes on from there.
    shutil.rmtree(vae_folder)
    posterior, calls = latent_cache.posterior, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return posterior(*arguments)

    monkeypatch.setattr(latent_cache, "posterior", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new()
    assert len(list(vae_folder.iterdir())) == 1
    assert new()[0] == 3

    shutil.rmtree(vae_folder)
    monkeypatch.setattr(latent_cache, "free_bytes", lambda folder: 10_000)
    with pytest.raises(UserError, match="TEXTCRAFTOR_CACHE"):
        new()


def test_latents_that_are_not_finite_are_refused(tmp_path):
    broken = tiny.seeded(7, tiny.make_vae).requires_grad_(False)
    broken.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="a.png.*"):
        encode_pictures(broken, read_pairs(save(tmp_path / "in", a="a cat"))[0], *SIZE, progress=False)


def test_a_sample_depends_on_its_number_alone(tmp_path, vae):
    folder = save(tmp_path / "in", **{f"p{number}": f"caption {number}" for number in range(9)})
    (folder / "p4.png").write_bytes(b"broken")
    (folder / "p5.txt").write_text("caption 0")  # held out, like that of p0
    pictures, held_out, lines, skipped = share_pictures(Accelerator(cpu=True), folder, None, 2, vae, SIZE)
    assert held_out == ["caption 0", "caption 1"] and [Path(name).name for name, _ in skipped] == ["p4.png"]
    assert list(pictures.captions) == [f"caption {number}" for number in (2, 3, 6, 7, 8)]
    assert "p4.png" in lines[0] and "5 pictures" in lines[1] and str(latent_cache.cache_root()) in lines[2]

    captions, latents, noise, t = direct_batch(pictures, 3, (100, 102), range(60))
    for number in (0, 17, 59):
        one = direct_batch(pictures, 3, (100, 102), [number])
        assert one[0] == [captions[number]]
        assert all(torch.equal(a[0], b[number]) for a, b in zip(one[1:], (latents, noise, t), strict=True))
    assert torch.equal(noise, prompt_noise(3, range(60), (4, 8, 8))) and t.shape == (60,) and t.dtype == torch.int64
    assert set(t.tolist()) == {100, 101, 102}
    assert all(Counter(captions[start : start + 5]) == Counter(pictures.captions) for start in range(0, 60, 5))
    draws = {caption: [] for caption in pictures.captions}
    for caption, latent, eps in zip(captions, latents, noise, strict=True):
        mean, std = pictures.latents[list(pictures.captions).index(caption)]
        draws[caption].append((latent - mean) / std)
        correlation = torch.corrcoef(torch.stack([draws[caption][-1].flatten(), eps.flatten()]))[0, 1]
        assert abs(correlation) < 0.35  # the draw is independent of the noise: 256 numbers each
    every = torch.stack([draw for several in draws.values() for draw in several])
    assert abs(every.mean()) < 0.05 and abs(every.std() - 1) < 0.05  # 15,360 numbers

    other = share_pictures(Accelerator(cpu=True), folder, folder / "p2.txt", 1, vae, SIZE)
    assert other[1] == ["caption 2"] and len(other[0].captions) == 7 and other[0].content != pictures.content
    for file in folder.glob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match="unreadable 9"):
        share_pictures(Accelerator(cpu=True), folder, None, 2, vae, SIZE)


def test_one_process_of_a_node_encodes_for_all(tmp_path, vae, monkeypatch):
    """Two nodes of two processes each, which are threads here; then, one that cannot read its pictures, and two that
    read different ones."""
    good = save(tmp_path / "good", a="a cat", b="a dog", c="an owl")
    other = save(tmp_path / "other", a="a cat", b="a dog", c="a fox")
    (tmp_path / "bad").mkdir()
    barrier, objects, calls = threading.Barrier(4), {}, []
    process = threading.local()

    def gather_object(mine):
        objects[process.index] = mine
        barrier.wait(60)
        everything = [value for index in range(4) for value in objects[index]]
        barrier.wait(60)
        return everything

    def run(index, path):
        process.index = index
        main = index % 2 == 0
        accelerator = SimpleNamespace(is_local_main_process=main, process_index=index, local_process_index=index % 2)
        try:
            pictures, held_out, *_ = share_pictures(accelerator, path, None, 1, vae, SIZE)
            return list(pictures.captions), held_out, pictures.latents[1][0].tolist(), pictures.content
        except UserError as problem:
            return str(problem)

    def encode(*arguments):
        calls.append(process.index)
        return encode_pictures(*arguments, progress=False)

    monkeypatch.setattr(image_data, "gather_object", gather_object)
    monkeypatch.setattr(image_data, "encode_pictures", encode)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, range(4), [good] * 4))
        assert found[0][:2] == (["a dog", "an owl"], ["a cat"]) and found.count(found[0]) == 4
        assert sorted(calls) == [0, 2]
        found = list(threads.map(run, range(4), [good, good, *[tmp_path / "bad"] * 2]))
        assert "no usable picture" in found[0] and found.count(found[0]) == 4
        found = list(threads.map(run, range(4), [good, good, other, other]))
        assert all("different pictures" in message for message in found)
    assert not list(tmp_path.glob("textcraftor-*"))
