"""
The HPSv2 benchmark: generate 800 images in each of four styles, save them as STYLE/00000.jpg, ..., and score the files
with HPS v2.

The paper's text encoder, on all GPUs of this machine (same as `sh test_hpsv2.sh`):
$ accelerate launch test_hpsv2.py --text_path checkpoints/tc_text_e_0_iter_10000.pth

The small Stable Diffusion in this repository, original and tuned, in minutes on a CPU:
$ python test_hpsv2.py --model miniature
$ python test_hpsv2.py --model miniature --text_path output/tc_text.safetensors

Two tuned encoders, mixed with the original one (0.6 a + 0.3 b + 0.1 original, in the tuned steps):
$ python test_hpsv2.py --text_path a.safetensors=0.6 --text_path b.safetensors=0.3

Score existing images of any model, named STYLE/00000.jpg, STYLE/00001.jpg, ...:
$ python test_hpsv2.py --score_only FOLDER

The same command continues an interrupted run.
"""

from textcraftor.benchmark.program import evaluate
from textcraftor.benchmark.prompt_lists import HPSV2
from textcraftor.errors import run_program

if __name__ == "__main__":
    run_program(lambda: evaluate(HPSV2, __doc__))
