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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

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
    parse_flag_from_env,
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
        device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # as Accelerator starts it
        args.mixed_precision, why = choose_precision(args.mixed_precision, device)
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
    groups = [
        {"params": list(part.network.requires_grad_().parameters()), "lr": part.learning_rate} for part in trained
    ]
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
    own_weights = {spec.rpartition(":")[2]: weight for spec, weight in args.weighted.items()}
    options |= {"images per step": global_batch, "reward weights": own_weights}
    options |= {"last step": last_step} if args.lr_scheduler != "constant_with_warmup" else {}
    options |= {"content": content, "tracker run": secrets.token_hex(4)}
    compared = [name for name in options if name not in FREE_ON_RESUME | {"tracker run"}]
    record, first_step = Record(output, columns, writes=is_main), 0
    checkpoints.keep_weights_out_of_state(accelerator)
    if args.resume:
        first_step = checkpoints.load_checkpoint(accelerator, trained, output)
        last_step = max(first_step, last_step)
        record.resume(options, compared if is_main else [], first_step)  # the main process alone knows the contents
        options["tracker run"] = read_options(output)["tracker run"]
        say(f"continuing after step {first_step} of the run in {output}")
    else:
        checkpoints.check_disk(output, trained, args.keep_checkpoints)
        record.start(options)
        record.add({"step": 0})
    bad_rows = [f"{path}: line {number}\n" for path, report in reports.items() for number in report["bad"]]
    if is_main and bad_rows:
        with write_whole(output / "bad_rows.txt") as file:
            file.write_text("".join(bad_rows), encoding="utf-8")
    start_trackers(accelerator, args, options, options["tracker run"], first_step)

    # Train. A signal raises Stopped at the next safe point: then the checkpoint is all that is written.
    sample = partial(make_images, networks, scheduler, guidance=args.guidance, weighting=args.prompt_weighting)
    run = Run(
        args, accelerator, output, sample, shape, rewards, monitors, names, trained, optimizer, factor, prompts,
        held_out, record, count_cut=partial(count_cut, model.tokenizer),
    )  # fmt: skip
    done, after = first_step, None
    bar = tqdm(total=last_step, initial=first_step, disable=not is_main, dynamic_ncols=True)
    with stop_signals() as received, bar:
        check_stop = partial(raise_if_stopped, accelerator, received)
        try:
            if "val_total" not in record.rows[-1] and is_due(args.val_every, done, last_step):
                after = look(run, done, len(held_out), check_stop)
            for step in range(first_step + 1, last_step + 1):
                row = train_step(run, step, check_stop)
                done = step
                record.add(row | {"epoch": step * global_batch / len(prompts)})
                bar.update()
                bar.set_postfix_str(record.line(["total", *names], WINDOW))
                check_stop()
                if is_due(args.val_every, step, last_step):
                    after = look(run, step, len(held_out), check_stop)
                elif args.sample_every and step % args.sample_every == 0:
                    look(run, step, min(GRID, len(held_out)), check_stop)
                accelerator.log(record.rows[-1], step=step)
                skips = len(list(takewhile(lambda row: row.get("skipped"), reversed(record.rows))))
                if skips:
                    say(f"step {step}: loss or gradient is not finite; update skipped, {skips} in a row")
                if skips >= MOST_SKIPS or step == last_step:
                    save(run, step)
                elif args.save_every and step % args.save_every == 0:
                    if checkpoints.has_room(output, trained):
                        save(run, step)
                    else:
                        say(f"step {step}: NOT SAVED: {output} is on a full disk; make room before the next save")
                if skips >= MOST_SKIPS:
                    raise UserError(f"{skips} updates in a row were not finite; the last good weights are in {output}")
        except Stopped:
            save(run, done)
            say(f"stopped after step {done}, all saved; continue with the same command and --resume")
            return accelerator.end_training()

    # Results.
    after = after or look(run, last_step, len(held_out), lambda: None)
    if is_main:
        before = load_look(output / "resume" / "before.safetensors")
        pictures.before_after_grid(before, after, held_out, f"{last_step} steps", output / "before_after.png")
        pictures.reward_curves(record.rows, names, monitor_names, output / "curves.png")
        print(paired_table(before[0], after[0]))
        skipped, cut = (sum(row.get(name, 0) for row in record.rows) for name in ("skipped", "cut"))
        print(f"{skipped:.0f} updates skipped; {cut:.0f} prompts cut, being longer than the text encoder reads")
        for name in (
            *(f"{part.name}.safetensors" for part in trained),
            "before_after.png",
            "curves.png",
            "metrics.csv",
        ):
            print(output / name)
    accelerator.end_training()


class Run(NamedTuple):
    """What the functions below share."""

    args: object
    accelerator: Accelerator
    output: Path
    sample: Callable  # make_images with all but prompts, noise and the number of tuned steps given
    shape: tuple[int, int, int]  # of one image's latents
    rewards: RewardSum
    monitors: list
    names: list[str]  # of the rewards
    trained: list[checkpoints.Trained]
    optimizer: torch.optim.Optimizer
    factor: Callable  # step -> what the learning rates are multiplied by
    prompts: Sequence[str]
    held_out: list[str]
    record: Record
    count_cut: Callable


def train_step(run, step, check_stop):
    """Sample, score, backward, update: one optimizer step -> its row of metrics.csv.

    loss = -(weighted sum of rewards), averaged over micro-batches and processes. check_stop() is called before each
    micro-batch and may raise: the weights are still those of the step before.
    """
    args, accelerator, optimizer, began = run.args, run.accelerator, run.optimizer, time.perf_counter()
    recompute = {"checkpoint": args.gradient_checkpointing == "full", "vae_checkpointing": args.vae_checkpointing}
    accumulation, process, processes = (
        args.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    parts, cut = [], 0
    for number in range(accumulation):
        check_stop()
        numbers = batch_numbers((step - 1) * accumulation + number, args.batch_size, process, processes)
        prompts, noise = training_batch(run.prompts, args.seed, run.shape, numbers)
        with ExitStack() as alone:
            for part in run.trained if number < accumulation - 1 else ():  # processes exchange the last sum only
                alone.enter_context(accelerator.no_sync(part.network))
            images = run.sample(prompts, noise, tuned_steps=args.grad_steps, **recompute)
            total, scores = run.rewards(images, prompts)
            if not total.requires_grad:
                raise UserError("no reward in use is differentiable in the images: there is nothing to learn from")
            accelerator.backward(-total.mean() / accumulation)
        cut += run.count_cut(prompts)
        parts.append(torch.stack([total.detach().mean(), *(scores[name].mean() for name in run.names)]))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf).item()

    # Means over all processes, from which each of them decides the same.
    here = torch.cat([torch.stack(parts).mean(dim=0), torch.tensor([cut * processes], device=accelerator.device)])
    *means, cut = accelerator.gather(here[None]).mean(dim=0).tolist()
    skip = not (math.isfinite(means[0]) and math.isfinite(grad_norm))
    for group, part in zip(optimizer.param_groups, run.trained, strict=True):
        group["lr"] = part.learning_rate * run.factor(step)
    if not skip:
        optimizer.step()
    elif accelerator.scaler:
        accelerator.scaler.update()
    optimizer.zero_grad()

    seconds = time.perf_counter() - began
    row = {"step": step, "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm, "skipped": skip, "cut": cut}
    row |= {"seconds": seconds, "images_per_second": args.batch_size * processes * accumulation / seconds}
    return row | dict(zip(["total", *run.names], means, strict=True))


def look(run, step, count, check_stop):
    """Sample `count` held-out prompts as at test time and draw the first -> (scores, images), see validate.

    With all held-out prompts it is a validation: the scores join the last row, and the best weights are kept.
    """

    def sample(prompts, indices):
        noise = validation_noise(indices, run.shape)
        return run.sample(prompts, noise, tuned_steps=min(run.args.step, TEST_TUNED_STEPS))

    held_out = run.held_out[:count]
    scores, images = validate(
        run.accelerator, sample, run.rewards, run.monitors, held_out, run.args.batch_size, GRID, check_stop
    )
    is_main = run.accelerator.is_main_process
    if count == len(run.held_out) and "val_total" not in run.record.rows[-1]:
        means = {f"val_{name}": score.mean().item() for name, score in scores.items()}
        if means["val_total"] > run.record.best("val_total"):
            checkpoints.save_weights(run.accelerator, run.trained, run.output, "_best")
        if is_main and step == 0:
            save_look(scores, images, run.output / "resume" / "before.safetensors")
        run.record.amend(means)
        if is_main:
            tqdm.write(f"step {step}, held out: " + ", ".join(f"{n} {s.mean():.4g}" for n, s in scores.items()))
    if is_main and run.args.sample_every:
        picture = pictures.sample_grid(images, held_out, scores, step)
        with write_whole(run.output / "samples" / f"step_{step:06d}.png") as file:
            picture.save(file)
        log_picture(run.accelerator, "held-out prompts", picture, step)
    return scores, images


def save(run, step):
    """Write a checkpoint of the weights and of all that continuing after `step` needs."""
    args, images = run.args, run.args.batch_size * run.args.gradient_accumulation_steps * run.accelerator.num_processes
    epoch = max(0, step * images - 1) // len(run.prompts)
    checkpoints.save_checkpoint(run.accelerator, run.trained, run.output, step, epoch, args.keep_checkpoints)


def is_due(every, step, last_step):
    """Whether something that happens every so many steps (0: only first and last) happens after this step."""
    return step in (0, last_step) or bool(every and step % every == 0)


def make_accelerator(args, output):
    """Accelerate's processes, precision and trackers, all given here: its environment variables must not change a run.

    Raises UserError for ways to split a network that are not supported.
    """
    # DistributedDataParallel averages gradients, the UNet's too, though it runs K times for one backward: a weight's
    # gradient is handed on after the last. Buffers are constants; to broadcast them would have processes wait for each
    # other in validation. Autocast must not cache: it may reuse weights cast without gradient. fp16's loss scale is
    # halved after each step that overflows: the last of MOST_SKIPS has scale 1.
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the training step accumulates itself
        log_with=args.report_to or None,
        project_dir=output,
        kwargs_handlers=[
            AutocastKwargs(cache_enabled=False),
            GradScalerKwargs(init_scale=2.0 ** (MOST_SKIPS - 1)),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    torch.backends.cuda.matmul.allow_tf32 = True  # fp32 products on tensor cores; convolutions do so by default
    if accelerator.distributed_type in ("DEEPSPEED", "MEGATRON_LM", "FSDP") and not accelerator.is_fsdp2:
        raise UserError(f"{accelerator.distributed_type.value}: not supported; to split a network, use FSDP version 2")
    if accelerator.is_fsdp2 and args.lr_text and args.lr_unet:
        raise UserError("FSDP splits one network: train the text encoder and the UNet one after the other")
    return accelerator


if __name__ == "__main__":
    run_program(main)
