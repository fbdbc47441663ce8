"""
PartiPrompts: generate 1,632 images and report their CLIP, aesthetic, PickScore and HPS v2 scores, overall and by group.

The paper's text encoder, on all GPUs of this machine (same as `sh test_parti.sh`):
$ accelerate launch test_parti.py --text_path checkpoints/tc_text_e_0_iter_10000.pth

The small Stable Diffusion in this repository, original and tuned, in minutes on a CPU:
$ python test_parti.py --model miniature
$ python test_parti.py --model miniature --text_path output/tc_text.safetensors

Two tuned encoders, mixed with the original one (0.6 a + 0.3 b + 0.1 original, in the tuned steps):
$ python test_parti.py --text_path a.safetensors=0.6 --text_path b.safetensors=0.3

Score existing images of any model, named 00000.png, 00001.png, ...:
$ python test_parti.py --score_only FOLDER

The same command continues an interrupted run.
"""

from textcraftor.benchmark.program import evaluate
from textcraftor.benchmark.prompt_lists import PARTI
from textcraftor.errors import run_program

if __name__ == "__main__":
    run_program(lambda: evaluate(PARTI, __doc__))
