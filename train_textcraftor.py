"""TextCraftor (https://arxiv.org/abs/2403.18978): fine-tune the text encoder of Stable Diffusion, and optionally
the UNet, with differentiable rewards, from prompts alone.

With the released script's settings, on all GPUs of this machine (same as `sh run_textcraftor.sh`):
$ accelerate launch train_textcraftor.py --prompts openprompts.csv

The miniature Stable Diffusion in this repository, in minutes on a CPU:
$ python train_textcraftor.py --model miniature

Second stage: train the UNet with the tuned text encoder:
$ accelerate launch train_textcraftor.py --text_path output/tc_text.safetensors --lr_text 0 --lr_unet 1e-6 \\
      --batch-size 1 --output-path output_unet

To resume a run that stopped, repeat its command with --resume. All options: textcraftor/training_options.py
"""

import copy
import math
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from textcraftor.errors import UserError, run_program
from textcraftor.options import COLUMNS, TERMS, check_all
from textcraftor.training_options import parse_options, recorded_options, sampling_settings

if __name__ == "__main__":
    run_program(parse_options)  # before the slow imports, so that --help and errors appear at once

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from rewards import REWARDS, check_files
from rewards.constraint import ClipConstraint, check_constraint
from rewards.own import load_function
from rewards.sum import RewardSum
from rewards.training import load_rewards
from textcraftor import checkpoints
from textcraftor.averaging import EMAModel, averaged, make_average
from textcraftor.bank import Bank, start_bank, with_bank
from textcraftor.checkpoints import Trained
from textcraftor.data import Data, data_checks, read_picture_data, read_prompt_data
from textcraftor.direct import make_direct_images
from textcraftor.embeddings import count_cut, embed_prompts
from textcraftor.hashes import run_content
from textcraftor.lora import add_lora
from textcraftor.models import Networks, check_model, latent_shape, load_model, make_networks, quiet_libraries
from textcraftor.objective import training_objective
from textcraftor.precision import PRECISIONS
from textcraftor.processes import Stopped, make_accelerator, raise_if_stopped, settle_precision, stop_signals
from textcraftor.run_folder import Record, only_run, read_options
from textcraftor.sampling import make_images, make_scheduler, training_sampler
from textcraftor.stream import batch_numbers, reused, samples_shown
from textcraftor.trackers import start_trackers
from textcraftor.validation import PICTURES, held_out_bank, look, show_results
from textcraftor.weight_files import check_text_encoder, load_text_encoder

WINDOW = 20  # the progress line shows averages over this many steps
MOST_SKIPS = 10  # end the run after this many skipped updates in a row; each halves the fp16 loss scale, down to 1


def main(argv=None):
    args = parse_options(argv)
    quiet_libraries()
    functions = check_inputs(args)
    with nullcontext() if args.fill else only_run(args.output_path):
        if (ready := set_up(args, functions)) is None:  # --fill
            return
        run, first_step, last_step = ready
        after = train(run, first_step, last_step)
        if after and run.accelerator.is_main_process:
            show_results(run, last_step, after)
        run.accelerator.end_training()


def check_inputs(args):
    """Report all missing or unusable files at once, before loading any model -> {user's own reward: function}."""
    specs = [] if args.fill else [*args.weighted, *args.monitored]
    checks = [(check_model, args.model), *data_checks(args)]
    checks += [(check_text_encoder, args.text_path)] if args.text_path else []
    checks += [(check_constraint, args.weights)] if args.clip_constraint else []
    check_all([*checks, (check_files, [spec for spec in specs if spec in REWARDS], args.weights)])
    return {spec: load_function(spec) for spec in specs if ":" in spec}


def set_up(args, functions):
    """Prepare prompts, networks, rewards, optimizer and run folder -> (Run, steps already done, last step).

    With --fill, only fill the bank -> None.
    """
    output = Path(args.output_path)
    why = settle_precision(args)
    accelerator = make_accelerator(args, loss_scale=2.0 ** (MOST_SKIPS - 1))
    device, is_main = accelerator.device, accelerator.is_main_process
    say = tqdm.write if is_main else lambda text: None
    low_precision = PRECISIONS[args.mixed_precision]
    set_seed(args.seed % 2**32)  # for users' own rewards; prompts and noise use their own generators

    # Data and networks. Frozen networks are cast to low precision; trained ones keep fp32 and run under autocast.
    data = read_prompt_data(accelerator, args) if args.method == "prompts" else None  # mistakes show before models load
    model = load_model(args.model)
    model.vae.to(device)
    data = data or read_picture_data(accelerator, args, model)
    text_encoder = copy.deepcopy(model.text_encoder) if args.lr_text or args.text_path else model.text_encoder
    if args.text_path:
        load_text_encoder(text_encoder, args.text_path)
    model.text_encoder.to(device, low_precision)
    model.vae.to(device, low_precision)
    full = args.lora_rank == 0  # beside a LoRA, the network's own weights are frozen
    model.unet.to(device, torch.float32 if args.lr_unet and full else low_precision)
    text_encoder.to(device, torch.float32 if args.lr_text and full else low_precision)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # all widths and resolutions share one compiled block
        model.unet.compile_repeated_blocks()
    global_batch = args.batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    epoch_steps = args.reuse * len(data.prompts) / global_batch
    last_step = min(args.max_steps or math.inf, math.ceil(args.epochs * epoch_steps) or math.inf)
    say("\n".join(data.lines))
    say(f"{last_step} steps of {global_batch} images on {device}, precision {args.mixed_precision} ({why}).")
    scheduler, bank = make_scheduler(model.scheduler_config, args.step), None
    if args.bank:
        bank = start_bank(args, accelerator, model, scheduler, data, last_step, global_batch, say)
    if args.fill:
        return None

    rewards, monitors, constraint = load_rewards(
        args, functions, data.prompts, model.text_encoder, device, low_precision
    )
    scored = [*rewards.rewards, *([constraint] if constraint else [])]
    own = [spec for spec in functions if spec in args.weighted]
    content = data.content | run_content(model, text_encoder, scored, own) if is_main else {}

    # The trained networks, their optimizer, and the networks that make images.
    parts = (("text_encoder", text_encoder, args.lr_text), ("unet", model.unet, args.lr_unet))
    trained = [Trained(*part, bool(args.lora_rank), sampling_settings(args)) for part in parts if part[2]]
    if accelerator.is_fsdp2:
        model.unet.to(memory_format=torch.contiguous_format)  # the only memory format that FSDP can shard
    networks = make_networks(model, text_encoder, args.tune_unconditional == "on")
    for part in trained:
        part.network.requires_grad_()
        if args.lora_rank:
            add_lora(part.network, part.part, args.lora_rank, args.lora_alpha or args.lora_rank, args.seed)
    groups = [{"params": part.weights(), "lr": part.learning_rate} for part in trained]
    optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
    *wrapped, optimizer = accelerator.prepare(*(part.network for part in trained), optimizer)
    trained = [part._replace(network=network) for part, network in zip(trained, wrapped, strict=True)]
    networks = networks._replace(**{part.part: part.network for part in trained})
    average = make_average(accelerator, checkpoints.all_weights(trained), args.ema)
    lengths = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": last_step + 1}
    (factor, *_) = get_scheduler(args.lr_scheduler, optimizer, **lengths).lr_lambdas  # a function of the step alone

    # Start a run folder, or continue after the last checkpoint in it.
    options, compared = recorded_options(args, global_batch, last_step, content)
    names, monitor_names = [reward.name for reward in rewards.rewards], [monitor.name for monitor in monitors]
    extras = [name for name in TERMS if getattr(args, name)]
    columns = [*COLUMNS, *names, *extras, *(f"val_{name}" for name in ("total", *names, *monitor_names))]
    record, first_step = Record(output, columns, writes=is_main), 0
    checkpoints.keep_weights_out_of_state(accelerator)
    if args.resume:
        record.check(options, compared if is_main else [])  # only the main process has the hashes
        first_step = checkpoints.load_checkpoint(accelerator, trained, output)
        if average:
            average.to(device)
        last_step = max(first_step, last_step)
        record.resume(first_step)
        options["tracker run"] = read_options(output)["tracker run"]
        say(f"resuming the run in {output} after step {first_step}")
    else:
        checkpoints.check_disk(output, trained, args.keep_checkpoints, bool(average))
        record.start(options)
        record.add({"step": 0})
    if is_main:
        data.write_skipped(output)
    start_trackers(accelerator, args, options, options["tracker run"], first_step)

    sample = partial(make_images, networks, scheduler, guidance=args.guidance, weighting=args.prompt_weighting)
    run = Run(
        args, accelerator, output, data, sample, scheduler, latent_shape(model),
        networks, rewards, monitors, constraint, trained, optimizer, average, bank, held_out_bank(args), factor, record,
        say,
    )  # fmt: skip
    return run, first_step, last_step


def train(run, first_step, last_step):
    """Train from first_step to last_step, validate and save -> (scores, images) of the last validation.

    On SIGINT or SIGTERM, save a checkpoint, skip everything else and return None.
    """
    args, record, say, done, logged, after = run.args, run.record, run.say, first_step, first_step, None
    is_main = run.accelerator.is_main_process
    bar = tqdm(total=last_step, initial=first_step, disable=not is_main, dynamic_ncols=True)
    with stop_signals() as received, bar:
        check_stop = partial(raise_if_stopped, run.accelerator, received)
        try:
            if "val_total" not in record.rows[-1] and is_due(args.val_every, done, last_step):
                after = look(run, done, len(run.data.held_out), check_stop)
                run.accelerator.log(record.rows[-1], step=done)
            for step in range(first_step + 1, last_step + 1):
                record.add(train_step(run, step, check_stop))
                done = step
                bar.update()
                bar.set_postfix_str(record.line(["total", *run.names], WINDOW))
                check_stop()
                if is_due(args.val_every, step, last_step):
                    after = look(run, step, len(run.data.held_out), check_stop)
                elif args.sample_every and step % args.sample_every == 0:
                    look(run, step, min(PICTURES, len(run.data.held_out)), check_stop)
                run.accelerator.log(record.rows[-1], step=(logged := step))
                skips = len(list(takewhile(lambda row: row.get("skipped"), reversed(record.rows))))
                if skips:
                    say(f"step {step}: loss or gradient is not finite; update skipped ({skips} in a row)")
                if skips >= MOST_SKIPS or step == last_step:
                    checkpoints.save_run(run, step)
                elif args.save_every and step % args.save_every == 0:
                    checkpoints.save_run(run, step, needed=False)
                if skips >= MOST_SKIPS:
                    raise UserError(
                        f"loss or gradient was not finite in {skips} updates in a row; {run.output} has the last good "
                        "weights: start a new run from them, with a lower learning rate"
                    )
        except Stopped:
            if logged < done:
                run.accelerator.log(record.rows[-1], step=done)
            checkpoints.save_run(run, done)
            say(f"stopped after step {done}, checkpoint saved; to continue, repeat the command with --resume")
            return None
    return after or look(run, last_step, len(run.data.held_out), lambda: None)


class Run(NamedTuple):
    """Everything that training, validation and saving share."""

    args: Namespace
    accelerator: Accelerator
    output: Path
    data: Data
    sample: Callable  # make_images with all but prompts, noise and tuned_steps filled in
    scheduler: DDIMScheduler
    shape: tuple[int, int, int]  # of one image's latents
    networks: Networks
    rewards: RewardSum
    monitors: list
    constraint: ClipConstraint | None
    trained: list[Trained]
    optimizer: torch.optim.Optimizer
    average: EMAModel | None  # of the trained weights
    bank: Bank | None  # keeps the first steps of training prompts
    held_out_bank: Bank | None  # and of held-out ones
    factor: Callable  # step -> learning-rate multiplier
    record: Record
    say: Callable  # prints a line above the progress bar, on the main process only

    @property
    def names(self):
        return [reward.name for reward in self.rewards.rewards]

    def averaged(self):
        """A context in which the trained networks have the weights' moving average, if there is one."""
        return averaged(self.average, checkpoints.all_weights(self.trained))

    @property
    def global_batch(self):
        """Images per optimizer step, over all processes."""
        return self.args.batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes


def train_step(run, step, check_stop):
    """Sample, score, backward, update: one optimizer step -> its row of metrics.csv.

    loss = -(weighted sum of rewards), averaged over micro-batches and processes. check_stop() may
    raise before any micro-batch; the weights are then still those of the previous step.
    """
    args, accelerator, optimizer, began = run.args, run.accelerator, run.optimizer, time.perf_counter()
    process, processes = accelerator.process_index, accelerator.num_processes
    accumulation = args.gradient_accumulation_steps
    recompute = {"checkpoint": args.gradient_checkpointing == "full", "vae_checkpointing": args.vae_checkpointing}
    if args.method == "direct":
        sample = partial(make_direct_images, run.networks, run.scheduler, guidance=args.guidance)
    else:
        sampler, tuned_steps = training_sampler(args.gradient, args.grad_range, args.driven, args.seed, step)
        sample = partial(run.sample, sampler=sampler, tuned_steps=tuned_steps)
    parts, cut = [], 0
    for number in range(accumulation):
        check_stop()
        numbers = batch_numbers((step - 1) * accumulation + number, args.batch_size, process, processes)
        numbers = reused(numbers, run.global_batch, args.reuse, args.seed)
        prompts, *start = run.data.batch(run.shape, numbers)
        if run.bank:
            sample = partial(run.sample, sampler=with_bank(run.bank, sampler, prompts, *start), tuned_steps=tuned_steps)
        with ExitStack() as local:
            for part in run.trained if number < accumulation - 1 else ():  # DDP averages gradients only after the last
                local.enter_context(accelerator.no_sync(part.network))
            conditions = embed_prompts(run.networks, prompts, args.prompt_weighting)
            images = sample(prompts, *start, conditions=conditions, **recompute)
            objective, scores = training_objective(
                args, run.rewards, run.constraint, run.networks.tokenizer, images, prompts, conditions
            )
            accelerator.backward(-objective.mean() / accumulation)
        cut += count_cut(run.networks.tokenizer, prompts)
        parts.append(torch.stack([run.rewards.total(scores).mean(), *(score.mean() for score in scores.values())]))
    parameters = checkpoints.all_weights(run.trained)
    grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
    grad_norm = getattr(grad_norm, "full_tensor", lambda: grad_norm)().float().reshape(1)  # whole, where FSDP splits it

    # Average over all processes, so that they all decide alike whether to skip this update. All numbers come to the
    # host at once: each time that it asks for one, a GPU runs out of work.
    here = torch.cat([torch.stack(parts).mean(dim=0), grad_norm, torch.full_like(grad_norm, cut * processes)])
    *means, grad_norm, cut = accelerator.gather(here[None]).mean(dim=0).tolist()
    skip = not (math.isfinite(means[0]) and math.isfinite(grad_norm))
    for group, part in zip(optimizer.param_groups, run.trained, strict=True):
        group["lr"] = part.learning_rate * run.factor(step)
    if not skip:
        optimizer.step()
        if run.average:
            run.average.step(parameters)
    elif accelerator.scaler:
        accelerator.scaler.update()
    optimizer.zero_grad()

    seconds, images = time.perf_counter() - began, run.global_batch
    epoch = samples_shown(step, images, args.reuse) / len(run.data.prompts)
    row = {"step": step, "epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
    row |= {"grad_norm": grad_norm, "skipped": skip, "cut": cut}
    row |= {"seconds": seconds, "images_per_second": images / seconds}
    return row | dict(zip(["total", *scores], means, strict=True))


def is_due(every, step, last_step):
    """Whether to run a periodic task after this step: every `every` steps (0 = never) and at steps 0 and last_step."""
    return step in (0, last_step) or bool(every and step % every == 0)


if __name__ == "__main__":
    run_program(main)
