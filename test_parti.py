"""
PartiPrompts: 1,632 images, and their CLIP, aesthetic, PickScore and HPSv2 scores, overall and by kind.

The paper's text encoder, on every GPU of this machine (the same as `sh test_parti.sh`):
$ accelerate launch test_parti.py --text_path checkpoints/tc_text_e_0_iter_10000.pth

The small Stable Diffusion that ships with this repository, on a CPU, in minutes, original and tuned:
$ python test_parti.py --model miniature
$ python test_parti.py --model miniature --text_path output/tc_text.safetensors

Go on after an interruption: the same command. Images that are there already, of any model, as 00000.png, 00001.png, …:
$ python test_parti.py --score_only FOLDER
"""

from textcraftor.benchmark.program import evaluate
from textcraftor.benchmark.prompt_lists import PARTI
from textcraftor.errors import run_program

if __name__ == "__main__":
    run_program(lambda: evaluate(PARTI, __doc__))
