"""
TextCraftor: reward fine-tuning of the text encoder (and, afterwards, the UNet) of Stable Diffusion, from prompts alone.
https://arxiv.org/abs/2403.18978

The paper's run, on every GPU of this machine (the same as `sh run_textcraftor.sh`):
$ accelerate launch train_textcraftor.py --prompts openprompts.csv

The small Stable Diffusion that ships with this repository, on a CPU, in minutes:
$ python train_textcraftor.py --model miniature

The second stage, the UNet under the tuned text encoder:
$ accelerate launch train_textcraftor.py --text_path output/tc_text.safetensors --lr_text 0 --lr_unet 1e-6 \\
      --batch-size 1 --output-path output_unet

Go on after an interruption: the same command and --resume
"""

import copy
import importlib.util
import json
import math
import time
from contextlib import ExitStack
from itertools import islice, takewhile
from pathlib import Path

from rewards import REWARDS
from textcraftor.errors import UserError, run_program
from textcraftor.options import COLUMNS, check_all, make_parser, require, reward_specs
from textcraftor.run_folder import Record, check_folder

REPOSITORY = Path(__file__).resolve().parent
WINDOW = 20  # steps that the progress line averages
GRID = 8  # held-out prompts on the pictures
HAS_FP16 = {"cuda", "xpu", "npu", "mps"}
MOST_SKIPS = 10  # updates skipped in a row that end the run

# fmt: off
OPTIONS = (  # The defaults are the paper's. `_` and `-` are the same in a name.
    ("--model",            "./stable-diffusion-v1-5", "folder, file, hub id, or `miniature` (with its defaults)"),
    ("--weights",          str(REPOSITORY),           "where the rewards' weights lie: hpsv2/, pickscore/, aesthetic/"),
    ("--text_path",        "",                        "tuned text encoder to start from (to keep, with --lr_text 0)"),
    ("--prompts",          "openprompts.csv",         "csv, tsv, txt, jsonl, parquet; column `prompt`, else the first"),
    ("--val_prompts",      "",                        "held-out prompts; none: the first of --prompts are held out"),
    ("--val_count",        16,                        "how many held-out prompts are sampled and scored"),
    ("--output-path",      "output",                  "for weights, metrics.csv, pictures and what --resume needs"),
    # What to reward.
    ("--clip",             0.5,                       "weight of the CLIP score; 0 = never loaded, as for all rewards"),
    ("--aesthetic",        1.0,                       "weight of the aesthetic score"),
    ("--pickscore",        1.0,                       "weight of PickScore"),
    ("--hpsv2",            1.0,                       "weight of HPS v2"),
    ("--reward",           [],                        "your own: path/to/file.py:function=weight (repeatable)"),
    ("--monitor",          [],                        "names or path/to/file.py:function, scored, never trained on"),
    # What to train.
    ("--lr_text",          1e-6,                      "learning rate of the text encoder, 0 = frozen"),
    ("--lr_unet",          0.0,                       "learning rate of the UNet, 0 = frozen"),
    ("--lr_warmup_steps",  0,                         "steps in which the learning rates rise to these"),
    ("--lr_scheduler",     ("constant_with_warmup", "linear", "cosine"), "how they go on, to 0 after the last step"),
    ("--max_grad_norm",    0.0,                       "cut the gradient to this norm, 0 = never"),
    # How to sample.
    ("--step",             25,                        "T, DDIM steps"),
    ("--grad_steps",       5,                         "K, last steps, under the tuned text encoder and with gradient"),
    ("--guidance",         7.5,                       "classifier-free guidance scale"),
    ("--prompt_weighting", 1.0,                       "w in w * tuned + (1 - w) * original, in the tuned steps"),
    # How long, how often, and on what.
    ("--batch-size",       4,                         "prompts at once on each process"),
    ("--gradient_accumulation_steps", 1,              "so many batches a step, for the memory of one"),
    ("--max_steps",        10_000,                    "end after so many steps, 0 = never"),
    ("--epochs",           0,                         "end after so many passes over the prompts, 0 = never"),
    ("--sample_every",     100,                       "steps from one sample picture to the next, 0 = none"),
    ("--val_every",        100,                       "steps from one validation to the next, 0 = first and last"),
    ("--save_every",       250,                       "steps from one checkpoint to the next, 0 = last"),
    ("--resume",           False,                     "go on with the run in --output-path"),
    ("--seed",             0,                         "of the order of the prompts and of the noise"),
    ("--mixed_precision",  ("no", "fp16", "bf16"),    "what networks compute in, and what frozen ones are kept in"),
    ("--gradient_checkpointing", ("full", "none"),    "none: faster, but memory grows by all activations a grad step"),
    ("--vae_checkpointing", False,                    "decode image by image, twice: for GPUs with little memory"),
    ("--compile",          False,                     "compile the UNet's transformer blocks; slower to start"),
    ("--report_to",        ("", "tensorboard", "wandb"), "tracker that gets metrics.csv's rows too"),
    ("-j --workers",       0,                         "processes that prepare batches, 0 = this one does"),
)
# fmt: on
# What may differ when a run is resumed; the rest would make it another run.
FREE_ON_RESUME = {"resume", "output_path", "weights", "workers", "report_to", "batch_size", "epochs", "max_steps"}
FREE_ON_RESUME |= {"gradient_accumulation_steps", "vae_checkpointing", "compile"}
FREE_ON_RESUME |= {"sample_every", "val_every", "save_every", "gradient_checkpointing"}


def parse_arguments(argv=None):
    """Command line -> options. `--model miniature` brings its own defaults; flags that are given win."""
    parser = make_parser(__doc__, OPTIONS)
    args = parser.parse_args(argv)
    if args.model == "miniature":
        folder = REPOSITORY / "miniature"
        defaults = json.loads((folder / "defaults.json").read_text())
        for name in {"prompts", "val_prompts"} & defaults.keys():
            defaults[name] = str(REPOSITORY / defaults[name])
        defaults["monitor"] = [] if args.monitor else [str(REPOSITORY / spec) for spec in defaults.get("monitor", [])]
        parser.set_defaults(weights=str(folder), **defaults)
        args = parser.parse_args(argv)
        args.model = str(folder / "stable-diffusion")
    return args


def check_arguments(args):
    """Raise UserError, one line, for options that make no sense."""
    require(args, {
        "step grad_steps batch_size gradient_accumulation_steps val_count": 1,
        "lr_text lr_unet lr_warmup_steps max_grad_norm max_steps epochs seed workers": 0,
        "guidance prompt_weighting sample_every val_every save_every": 0,
    })  # fmt: skip
    if not args.grad_steps <= args.step <= 1000:
        raise UserError(
            f"--grad_steps {args.grad_steps} --step {args.step}: the steps with gradient are the last ones of all, "
            "so grad_steps <= step <= 1000"
        )
    if args.epochs == args.max_steps == 0:
        raise UserError("--epochs 0 --max_steps 0: would never end; give one of them")
    if args.lr_text == args.lr_unet == 0:
        raise UserError("--lr_text 0 --lr_unet 0: nothing would be trained; give one of them a learning rate, say 1e-6")
    if args.report_to and importlib.util.find_spec(args.report_to) is None:
        raise UserError(f"--report_to {args.report_to}: is not installed; pip install {args.report_to}")
    check_folder(args.output_path, args.resume)


def main(argv=None):
    args = parse_arguments(argv)
    check_arguments(args)
    weighted, monitored = reward_specs({name: getattr(args, name) for name in REWARDS}, args.reward, args.monitor)
    output = Path(args.output_path)

    # Imported only now: whatever is wrong above is said at once.
    import torch
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, GradScalerKwargs, set_seed
    from diffusers.optimization import get_scheduler
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from rewards import check_files, load_reward
    from rewards.own import load_function
    from rewards.sum import RewardSum
    from textcraftor import checkpoints, pictures
    from textcraftor.interrupts import stop_signals
    from textcraftor.models import check_model, count_cut, embed_prompts, encode_prompts, load_model, quiet_libraries
    from textcraftor.prompts import check_prompts, checksum, hold_out, read_prompts
    from textcraftor.sampling import decode, make_scheduler, sample_latents
    from textcraftor.stream import PromptStream, batches
    from textcraftor.validation import TEST_GRAD_STEPS, comparison, load_look, save_look, validate, validation_noise

    # Files: all that is missing in one message, then the prompts.
    checks = [(check_model, args.model), (check_prompts, args.prompts)]
    checks += [(check_prompts, args.val_prompts)] if args.val_prompts else []
    checks += [(checkpoints.check_weights, args.text_path)] if args.text_path else []
    checks += [(check_files, [spec for spec in (*weighted, *monitored) if spec in REWARDS], args.weights)]
    quiet_libraries()
    check_all(checks)
    functions = {spec: load_function(spec) for spec in (*weighted, *monitored) if ":" in spec}
    prompts, dropped = read_prompts(args.prompts)
    to_hold_out, val_dropped = read_prompts(args.val_prompts) if args.val_prompts else ([], {"bad": []})
    prompts, held_out = hold_out(prompts, to_hold_out, args.val_count)

    # Processes and precision. DistributedDataParallel averages gradients, the UNet's too, though it runs K times or 2 K
    # for one backward: a weight's gradient is handed on after the last. Buffers are constants; to broadcast them would
    # have processes wait for each other in validation. Autocast must not cache: it may reuse weights cast without
    # gradient. fp16's loss scale is halved after each step that it makes infinite: the last of MOST_SKIPS has scale 1.
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to or None, project_dir=output,
        kwargs_handlers=[AutocastKwargs(cache_enabled=False), GradScalerKwargs(init_scale=2.0 ** (MOST_SKIPS - 1)),
                         DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )  # fmt: skip
    device, is_main = accelerator.device, accelerator.is_main_process
    if accelerator.distributed_type in ("DEEPSPEED", "MEGATRON_LM", "FSDP") and not accelerator.is_fsdp2:
        raise UserError(f"{accelerator.distributed_type.value}: to split a network, take FSDP, version 2")
    if accelerator.is_fsdp2 and args.lr_text and args.lr_unet:
        raise UserError("FSDP: splits one network; train the text encoder and the UNet one after the other")
    if args.mixed_precision == "fp16" and device.type not in HAS_FP16:
        raise UserError("--mixed_precision fp16: needs a GPU; on a CPU take bf16 or no")
    low_precision = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    torch.backends.cuda.matmul.allow_tf32 = True  # fp32 products on tensor cores; convolutions do so by default
    accumulation = args.gradient_accumulation_steps
    global_batch = args.batch_size * accelerator.num_processes * accumulation
    last_step = min(args.max_steps or math.inf, math.ceil(args.epochs * len(prompts) / global_batch) or math.inf)
    set_seed(args.seed % 2**32)  # for users' own rewards; order and noise take the whole seed
    say = tqdm.write if is_main else lambda text: None
    say(
        f"{args.prompts}: {len(prompts)} prompts to train on, {len(held_out)} held out; {dropped['empty']} empty and "
        f"{dropped['duplicate']} repeated ones dropped. {last_step} steps of {global_batch} images on {device}."
    )
    bad_rows = {args.prompts: dropped["bad"], args.val_prompts: val_dropped["bad"]}
    for path, lines in bad_rows.items():
        if lines:
            say(f"{path}: {len(lines)} bad rows skipped, the first at line {lines[0]}; bad_rows.txt has all numbers")

    # Model. What is frozen is kept in low precision and computes in it; what trains is fp32, under autocast.
    tokenizer, original_encoder, unet, vae, scheduler_config = load_model(args.model)
    text_encoder = copy.deepcopy(original_encoder) if args.lr_text or args.text_path else original_encoder
    if args.text_path:
        checkpoints.load_text_encoder(text_encoder, args.text_path)
    original_encoder.to(device, low_precision)
    text_encoder.to(device, torch.float32 if args.lr_text else low_precision)
    unet.to(device, torch.float32 if args.lr_unet else low_precision)
    vae.to(device, low_precision)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # blocks of all widths and resolutions share one piece of code
        unet.compile_repeated_blocks()
    scheduler = make_scheduler(scheduler_config, args.step)
    recompute = args.gradient_checkpointing == "full"
    latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    with torch.no_grad():
        unconditional = encode_prompts(tokenizer, original_encoder, [""])

    def generate(prompts, noise, grad_steps):
        """B prompts and their noise (B, C, h, w) -> images (B, 3, H, W) in [0, 1], differentiable in what trains."""
        encoders = (original_encoder, text_encoder, unconditional)
        original, tuned = embed_prompts(tokenizer, *encoders, prompts, args.prompt_weighting)
        z = sample_latents(unet, scheduler, noise.to(device), original, tuned, args.guidance, grad_steps, recompute)
        return decode(vae, z, args.vae_checkpointing)

    # Rewards, and monitors.
    def load(spec):
        return functions[spec] if spec in functions else load_reward(spec, args.weights, device, low_precision)

    rewards = RewardSum([(load(spec), weight) for spec, weight in weighted.items()])
    monitors = [load(spec) for spec in monitored]

    # What trains: the name of its files -> network, learning rate, how it is written.
    trained = {"tc_text": (text_encoder, args.lr_text, checkpoints.save_text_encoder)} if args.lr_text else {}
    trained |= {"tc_unet": (unet, args.lr_unet, checkpoints.save_unet)} if args.lr_unet else {}
    groups = [{"params": list(net.requires_grad_().parameters()), "lr": lr} for net, lr, _ in trained.values()]
    if accelerator.is_fsdp2:
        unet.to(memory_format=torch.contiguous_format)  # it splits no other
    networks = [network for network, _, _ in trained.values()]
    *networks, optimizer = accelerator.prepare(*networks, torch.optim.AdamW(groups))
    text_encoder = networks[0] if args.lr_text else text_encoder
    unet = networks[-1] if args.lr_unet else unet
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def write_weights(suffix=""):
        for (name, (_, _, write)), network in zip(trained.items(), networks, strict=True):
            state = accelerator.get_state_dict(network)  # from all processes, if each holds a part
            if is_main:
                write(state, output / f"{name}{suffix}.safetensors")

    def save(step):
        write_weights(f"_e_{(step * global_batch - 1) // len(prompts)}_iter_{step}")
        write_weights()
        if is_main:
            pictures.reward_curves(record.rows, names, monitor_names, output / "curves.png")
        checkpoints.save_state(accelerator, output / "resume", step)

    # Start, or go on after the last checkpoint.
    names, monitor_names = [reward.name for reward in rewards.rewards], [monitor.name for monitor in monitors]
    columns = [*COLUMNS, *names, *(f"val_{name}" for name in ("total", *names, *monitor_names))]
    options = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    options |= {"last step": last_step} if args.lr_scheduler != "constant_with_warmup" else {}
    options |= {"images a step": global_batch, "checksum of prompts": [checksum(prompts), checksum(held_out)]}
    record, first_step = Record(output, columns, writes=is_main), 0
    if args.resume:
        state, first_step = checkpoints.last_state(output / "resume")
        last_step = max(first_step, last_step)
        record.resume(options, first_step)
        say(f"going on after step {first_step} of the run in {output}")
        if state:
            accelerator.load_state(str(state))
    else:
        record.start(options)
    if is_main and any(bad_rows.values()):
        lines = (f"{path}: line {number}\n" for path, numbers in bad_rows.items() for number in numbers)
        (output / "bad_rows.txt").write_text("".join(lines), encoding="utf-8")
    accelerator.init_trackers("textcraftor", {name: str(value) for name, value in options.items()})

    def look(step, count, may_be_best=True):
        """Score `count` held-out prompts, made as at test time, and show the first; keep the weights if the best."""

        def make(batch, indices):
            return generate(batch, validation_noise(indices, latent_shape), min(args.step, TEST_GRAD_STEPS))

        scores, images = validate(accelerator, make, rewards, monitors, held_out[:count], args.batch_size, GRID)
        if may_be_best and scores["total"].mean() > record.best("val_total"):
            write_weights("_best")
        if is_main and args.sample_every:
            path = output / "samples" / f"step_{step:06d}.png"
            pictures.save(pictures.sample_grid(images, held_out[:count], scores, step), path)
        return scores, images

    # Before training: the first look is kept on disk for the comparison at the end, also of a resumed run.
    before_path = output / "resume" / "before.safetensors"
    if not record.rows:
        scores, images = look(0, len(held_out))
        if is_main:
            save_look(scores, images, before_path)
        record.add({"step": 0} | {f"val_{name}": score.mean().item() for name, score in scores.items()})
        accelerator.log(record.rows[0], step=0)

    # Train.
    stream = PromptStream(prompts, args.seed, latent_shape)
    first_batch, last_batch = first_step * accumulation, last_step * accumulation
    mine = batches(first_batch, last_batch, args.batch_size, accelerator.process_index, accelerator.num_processes)
    lengths = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": last_step + 1}
    (factor, *_) = get_scheduler(args.lr_scheduler, optimizer, **lengths).lr_lambdas  # of the step alone: none to save
    bar = tqdm(total=last_step, initial=first_step, disable=not is_main, dynamic_ncols=True)
    after = None
    with stop_signals() as stop, bar:
        loader = iter(DataLoader(stream, batch_sampler=mine, num_workers=args.workers))
        for step in range(first_step + 1, last_step + 1):
            began = time.perf_counter()

            # Sample, score, and the gradient of loss = -sum of weighted rewards.
            cut, parts = 0, []
            for number, batch in enumerate(islice(loader, accumulation), 1):
                with ExitStack() as alone:
                    for network in networks if number < accumulation else ():  # processes exchange the last sum only
                        alone.enter_context(accelerator.no_sync(network))
                    images = generate(batch["prompt"], batch["noise"], args.grad_steps)
                    total, scores = rewards(images, batch["prompt"])
                    if not total.requires_grad:
                        raise UserError("no reward in use is differentiable in the images: nothing to learn from")
                    accelerator.backward(-total.mean() / accumulation)
                cut += count_cut(tokenizer, batch["prompt"])
                parts.append(torch.stack([total.detach().mean(), *(scores[name].mean() for name in names)]))
            grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf).item()

            # Means over all processes, from which each of them decides the same.
            counts = torch.tensor([cut * accelerator.num_processes, len(stop)], device=device)
            here = torch.cat([torch.stack(parts).mean(dim=0), counts])
            *means, cut, stopping = accelerator.gather(here[None]).mean(dim=0).tolist()

            # Update, unless loss or gradient are not finite.
            skip = not (math.isfinite(means[0]) and math.isfinite(grad_norm))
            for group, (_, rate, _) in zip(optimizer.param_groups, trained.values(), strict=True):
                group["lr"] = rate * factor(step)
            if not skip:
                optimizer.step()
            elif accelerator.scaler:
                accelerator.scaler.update()
            optimizer.zero_grad()

            # Write down.
            seconds = time.perf_counter() - began
            row = {"step": step, "epoch": step * global_batch / len(prompts), "seconds": seconds, "cut": cut}
            row |= {"images_per_second": global_batch / seconds, "grad_norm": grad_norm, "skipped": skip}
            row |= {"lr": optimizer.param_groups[0]["lr"]}
            row |= dict(zip(["total", *names], means, strict=True))
            if step == last_step or (args.val_every and step % args.val_every == 0):
                after = look(step, len(held_out))
                row |= {f"val_{name}": score.mean().item() for name, score in after[0].items()}
                say(f"step {step}, held out: " + ", ".join(f"{n} {s.mean():.4g}" for n, s in after[0].items()))
            elif args.sample_every and step % args.sample_every == 0:
                look(step, min(GRID, len(held_out)), may_be_best=False)
            record.add(row)
            accelerator.log(row, step=step)
            bar.update()
            bar.set_postfix_str(record.line(["total", *names], WINDOW))

            # Stop, save.
            skips = len(list(takewhile(lambda row: row.get("skipped"), reversed(record.rows))))
            if skip:
                say(f"step {step}: total {means[0]}, gradient norm {grad_norm}: skipped, {skips} in a row")
            end = stopping or skips >= MOST_SKIPS or step == last_step
            if end or (args.save_every and step % args.save_every == 0):
                save(step)
            if skips >= MOST_SKIPS:
                raise UserError(f"{skips} steps in a row were not finite; the last good weights are saved in {output}")
            if stopping:
                say(f"stopped after step {step}, all saved; go on with the same command and --resume")
                return accelerator.end_training()

    # Results.
    after = after or look(last_step, len(held_out))
    if is_main:
        before = load_look(before_path)
        pictures.before_after_grid(before, after, held_out, f"{last_step} steps", output / "before_after.png")
        print(comparison(before[0], after[0]))
        skipped, cut = (sum(row.get(name, 0) for row in record.rows) for name in ("skipped", "cut"))
        print(f"{skipped:.0f} steps skipped; {cut:.0f} prompts were longer than the text encoder reads, and cut")
        for name in (*(f"{name}.safetensors" for name in trained), "before_after.png", "curves.png", "metrics.csv"):
            print(output / name)
    accelerator.end_training()


if __name__ == "__main__":
    run_program(main)
