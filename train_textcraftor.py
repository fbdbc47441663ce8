"""
TextCraftor: reward fine-tuning of the text encoder (and, afterwards, the UNet) of Stable Diffusion, from prompts alone.
https://arxiv.org/abs/2403.18978

The released script's run, on every GPU of this machine (the same as `sh run_textcraftor.sh`):
$ accelerate launch train_textcraftor.py --prompts openprompts.csv

The small Stable Diffusion that ships with this repository, on a CPU, in minutes:
$ python train_textcraftor.py --model miniature

The second stage, the UNet under the tuned text encoder:
$ accelerate launch train_textcraftor.py --text_path output/tc_text.safetensors --lr_text 0 --lr_unet 1e-6 \\
      --batch-size 1 --output-path output_unet

Continue after an interruption: the same command and --resume. All options: textcraftor/training_options.py
"""

import copy
import math
import secrets
import time
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from pathlib import Path

from textcraftor.errors import UserError, run_program
from textcraftor.options import COLUMNS, TEST_TUNED_STEPS, check_all
from textcraftor.training_options import FREE_ON_RESUME, parse_options

if __name__ == "__main__":
    run_program(parse_options)  # before the slow imports: --help and mistakes are answered at once

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    set_seed,
)
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from rewards import REWARDS, check_files, load_reward
from rewards.own import load_function
from rewards.sum import RewardSum
from textcraftor import checkpoints, pictures
from textcraftor.embeddings import count_cut
from textcraftor.files import write_whole
from textcraftor.hashes import file_hash, weights_hash
from textcraftor.interrupts import Stopped, raise_if_stopped, stop_signals
from textcraftor.models import check_model, latent_shape, load_model, make_networks, quiet_libraries
from textcraftor.precision import PRECISIONS, choose_precision
from textcraftor.prompts import check_prompts, checksum, describe
from textcraftor.run_folder import Record, read_options
from textcraftor.sampling import make_images, make_scheduler
from textcraftor.statistics import paired_table
from textcraftor.stream import batch_numbers, share_prompts, training_batch
from textcraftor.trackers import log_picture, start_trackers
from textcraftor.validation import load_look, save_look, validate, validation_noise
from textcraftor.weight_files import check_text_encoder, load_text_encoder, load_unet, save_text_encoder, save_unet

WINDOW = 20  # steps that the progress line averages
GRID = 8  # held-out prompts in the pictures
MOST_SKIPS = 10  # updates skipped in a row that end the run


def main(argv=None):
    args = parse_options(argv)
    output = Path(args.output_path)
    specs = [*args.weighted, *args.monitored]

    # Files: everything that is missing, in one message, before any model is loaded.
    quiet_libraries()
    checks = [(check_model, args.model), (check_prompts, args.prompts)]
    checks += [(check_prompts, args.val_prompts)] if args.val_prompts else []
    checks += [(check_text_encoder, args.text_path)] if args.text_path else []
    check_all([*checks, (check_files, [spec for spec in specs if spec in REWARDS], args.weights)])
    functions = {spec: load_function(spec) for spec in specs if ":" in spec}

    # Processes and precision.
    if args.resume and args.mixed_precision == "auto":
        args.mixed_precision, why = read_options(output).get("mixed_precision", "auto"), "as when this run began"
    else:
        args.mixed_precision, why = choose_precision(args.mixed_precision, PartialState().device)
    accelerator = make_accelerator(args, output)
    device, is_main = accelerator.device, accelerator.is_main_process
    say = tqdm.write if is_main else lambda text: None
    low_precision = PRECISIONS[args.mixed_precision]
    set_seed(args.seed % 2**32)  # for users' own rewards; the order of prompts and the noise use the whole seed

    # Prompts.
    prompts, held_out, reports = share_prompts(accelerator, args.prompts, args.val_prompts, args.val_count)
    global_batch = args.batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    last_step = min(args.max_steps or math.inf, math.ceil(args.epochs * len(prompts) / global_batch) or math.inf)
    for path, report in reports.items():
        say(describe(path, report))
    say(f"{len(prompts)} prompts to train on, {len(held_out)} held out.")
    say(f"{last_step} steps of {global_batch} images on {device}, precision {args.mixed_precision} ({why}).")

    # Model. What is frozen is kept and computed in low precision; what trains is fp32, under autocast.
    model = load_model(args.model)
    text_encoder = copy.deepcopy(model.text_encoder) if args.lr_text or args.text_path else model.text_encoder
    if args.text_path:
        load_text_encoder(text_encoder, args.text_path)
    content = {}
    if is_main:
        content |= {"training prompts": checksum(prompts), "held-out prompts": checksum(held_out)}
        content |= {"model": [weights_hash(network) for network in model[1:4]], "text_path": weights_hash(text_encoder)}
        content |= {spec.rpartition(":")[2]: file_hash(spec.rpartition(":")[0]) for spec in functions}
    model.text_encoder.to(device, low_precision)
    model.vae.to(device, low_precision)
    model.unet.to(device, torch.float32 if args.lr_unet else low_precision)
    text_encoder.to(device, torch.float32 if args.lr_text else low_precision)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # blocks of all widths and resolutions share one piece of code
        model.unet.compile_repeated_blocks()
    networks = make_networks(model, text_encoder)
    scheduler, shape = make_scheduler(model.scheduler_config, args.step), latent_shape(model)

    # Rewards and monitors.
    def load(spec):
        return functions[spec] if spec in functions else load_reward(spec, args.weights, device, low_precision)

    rewards = RewardSum([(load(spec), weight) for spec, weight in args.weighted.items()])
    monitors = [load(spec) for spec in args.monitored]

    # What trains, and its optimizer.
    trained = []
    if args.lr_text:
        trained.append(checkpoints.Trained("tc_text", text_encoder, args.lr_text, save_text_encoder, load_text_encoder))
    if args.lr_unet:
        trained.append(checkpoints.Trained("tc_unet", model.unet, args.lr_unet, save_unet, load_unet))
    if accelerator.is_fsdp2:
        model.unet.to(memory_format=torch.contiguous_format)  # FSDP splits no other format
    groups = [{"params": list(part.network.requires_grad_().parameters()), "lr": part.learning_rate} for part in trained]
    *wrapped, optimizer = accelerator.prepare(*(part.network for part in trained), torch.optim.AdamW(groups))
    trained = [part._replace(network=network) for part, network in zip(trained, wrapped, strict=True)]
    by_name = {part.name: part.network for part in trained}
    networks = networks._replace(
        text_encoder=by_name.get("tc_text", networks.text_encoder), unet=by_name.get("tc_unet", networks.unet)
    )
    lengths = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": last_step + 1}
    (factor, *_) = get_scheduler(args.lr_scheduler, optimizer, **lengths).lr_lambdas  # a function of the step alone

    # Start, or resume after the last checkpoint.
    names, monitor_names = [reward.name for reward in rewards.rewards], [monitor.name for monitor in monitors]
    columns = [*COLUMNS, *names, *(f"val_{name}" for name in ("total", *names, *monitor_names))]
    options = {name: value for name, value in vars(args).items() if name not in ("weighted", "monitored")}
    options |= {"images per step": global_batch, "reward weights": {spec.rpartition(":")[2]: w for spec, w in args.weighted.items()}}
    options |= {"last step": last_step} if args.lr_scheduler != "constant_with_warmup" else {}
    options |= {"content": content, "tracker run": secrets.token_hex(4)}
    compared = [name for name in options if name not in FREE_ON_RESUME | {"tracker run"}]
    record, first_step = Record(output, columns, writes=is_main), 0
    checkpoints.keep_weights_out_of_state(accelerator)
    if args.resume:
        first_step = checkpoints.load_checkpoint(accelerator, trained, output)
        last_step = max(first_step, last_step)
        if is_main:
            record.resume(options, compared, first_step)
            options["tracker run"] = read_options(output)["tracker run"]
        say(f"continuing after step {first_step} of the run in {output}")
    elif is_main:
        checkpoints.check_disk(output, trained, args.keep_checkpoints)
        record.start(options)
        record.add({"step": 0})
    bad_rows = [f"{path}: line {number}\n" for path, report in reports.items() for number in report["bad"]]
    if is_main and bad_rows:
        with write_whole(output / "bad_rows.txt") as file:
            file.write_text("".join(bad_rows), encoding="utf-8")
    start_trackers(accelerator, args, options, options["tracker run"], first_step)

    # Train. A signal to stop raises Stopped at the next safe point, and the state is all that is saved then.
    draw = partial(make_images, networks, scheduler, guidance=args.guidance, weighting=args.prompt_weighting)
    recompute = {"checkpoint": args.gradient_checkpointing == "full", "vae_checkpointing": args.vae_checkpointing}
    draw_training = partial(draw, tuned_steps=args.grad_steps, **recompute)
    draw_test = partial(draw, tuned_steps=min(args.step, TEST_TUNED_STEPS))
    before_path, after, done = output / "resume" / "before.safetensors", None, first_step
    bar = tqdm(total=last_step, initial=first_step, disable=not is_main, dynamic_ncols=True)

    def save(step):
        epoch = (step * global_batch - 1) // len(prompts) if step else 0
        checkpoints.save_checkpoint(accelerator, trained, output, step, epoch, args.keep_checkpoints)

    with stop_signals() as received, bar:
        check_stop = partial(raise_if_stopped, accelerator, received)

        def look(step, count, save_best):
            """Validate on `count` held-out prompts: pictures, the best weights, and the last row's val_ columns."""

            def make(batch, indices):
                return draw_test(batch, validation_noise(indices, shape))

            found = validate(
                accelerator, make, rewards, monitors, held_out[:count], args.batch_size, GRID, between=check_stop
            )
            scores, images = found
            means = {f"val_{name}": score.mean().item() for name, score in scores.items()}
            if save_best and means["val_total"] > record.best("val_total"):
                checkpoints.save_weights(accelerator, trained, output, "_best")
            if is_main and args.sample_every:
                picture = pictures.sample_grid(images, held_out[:count], scores, step)
                with write_whole(output / "samples" / f"step_{step:06d}.png") as file:
                    picture.save(file)
                log_picture(accelerator, "held-out prompts", picture, step)
            if save_best and is_main:
                if step == 0:  # kept on disk for the comparison at the end, also of a resumed run
                    save_look(scores, images, before_path)
                record.amend(means)
                say(f"step {step}, held out: " + ", ".join(f"{n} {s.mean():.4g}" for n, s in scores.items()))
            return found

        def is_validated(step):
            return step in (0, last_step) or (args.val_every and step % args.val_every == 0)
