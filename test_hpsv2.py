"""
The HPSv2 benchmark: four styles of 800 images, saved as STYLE/00000.jpg and scored by HPSv2 from these files.

The paper's text encoder, on every GPU of this machine (the same as `sh test_hpsv2.sh`):
$ accelerate launch test_hpsv2.py --text_path checkpoints/tc_text_e_0_iter_10000.pth

The small Stable Diffusion that ships with this repository, on a CPU, in minutes, original and tuned:
$ python test_hpsv2.py --model miniature
$ python test_hpsv2.py --model miniature --text_path output/tc_text.safetensors

Go on after an interruption: the same command. Images that are there already, of any model, as STYLE/00000.jpg, …:
$ python test_hpsv2.py --score_only FOLDER
"""

from textcraftor.benchmark.program import evaluate
from textcraftor.benchmark.prompt_lists import HPSV2
from textcraftor.errors import run_program

if __name__ == "__main__":
    run_program(lambda: evaluate(HPSV2, __doc__))
