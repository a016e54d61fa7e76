"""Tables of the vision systems and their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import protocol
from benchmarks.support.footer import footer


def segmentation(record: Mapping[str, Any]) -> list[str]:
    """Pictures a second of each way to run one network, and how far its answers move."""
    lines = [
        "| batch | how | pictures/s | : baseline | scores move by | classes that change |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        for who, rate in row["images_per_second"].items():
            told = protocol.shown(row["speed"][who]) if who in row["speed"] else "baseline"
            moved = row["moved"][who]
            far = f"{moved['scores']:.1e} | {moved['classes']:.2%}"
            lines.append(f"| {row['batch']} | {who} | {rate:.1f} | {told} | {far} |")
    high, wide = record["size"]
    about = f"GCN on EfficientNet-Lite0, {wide} x {high} pixels. "
    return [*lines, "", about + footer("segmentation", record["machine"])]


def backbone(record: Mapping[str, Any]) -> list[str]:
    """Pictures a second of each way to run one network, and how far its logits move."""
    lines = [
        "| network | batch | how | pictures/s | : timm | logits move by | compiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        for who, rate in row["images_per_second"].items():
            told = protocol.shown(row["speed"][who]) if who in row["speed"] else "baseline"
            took = f"{row['warmup_seconds'][who]:.0f} s" if who in row["warmup_seconds"] else ""
            far = f"{row['moved'][who]:.1e}"
            lines.append(f"| {row['name']} | {row['batch']} | {who} | {rate:.1f} | {told} | {far} | {took} |")
    return [*lines, "", footer("backbone", record["machine"])]


def detection(record: Mapping[str, Any]) -> list[str]:
    """What regions cost each head, and where the time of a picture goes."""
    lines: list[str] = []
    if "heads" in record:
        found = record["heads"]
        counts = [name.rpartition(", ")[2] for name in found["seconds"] if name.startswith("R-FCN")]
        lines += [f"| head, seconds for regions | {' | '.join(counts)} | {counts[-1]} : {counts[0]} |"]
        lines += ["|---" * (len(counts) + 2) + "|"]
        for who, slope in found["slopes"].items():
            told = " | ".join(f"{found['seconds'][f'{who}, {count}']['wall_median']:.3f}" for count in counts)
            lines.append(f"| {who} | {told} | {protocol.shown(slope)} |")
        lines.append("")
    if "latency" in record:
        found = record["latency"]
        stages = list(found["shares"])
        lines += [f"| ThunderNet-SNet49, {found['side']} px, one picture | {' | '.join(stages)} |"]
        lines += ["|---" * (len(stages) + 1) + "|"]
        shares = " | ".join(f"{share:.0%}" for share in found["shares"].values())
        lines += [f"| {found['images_per_second']:.1f} images/s | {shares} |", ""]
    return [*lines, footer("detection", record["machine"])]


def sam(record: Mapping[str, Any]) -> list[str]:
    """Seconds of the encoder, of a click and of all masks, beside the peers, and how far the answers lie apart."""
    lines: list[str] = []
    if "encoder" in record:
        found = record["encoder"]
        lines += [
            f"| image encoder, {found['model']} | seconds | : transformers | relative error |",
            "|---|---|---|---|",
        ]
        for who, one in found["seconds"].items():
            told = protocol.shown(found["speed"][who]) if who in found["speed"] else "baseline"
            lines.append(f"| {who} | {one['wall_median']:.2f} | {told} | {found['far'][who]:.1e} |")
        lines.append("")
    if "decoder" in record:
        clicks = record["decoder"]["clicks"]
        lines += [
            f"| a click, {record['decoder']['model']} | at once | ms each | : segment_anything | relative error |"
        ]
        lines += ["|---|---|---|---|---|"]
        for count, found in clicks.items():
            for who, one in found["seconds"].items():
                told = protocol.shown(found["speed"][who]) if who in found["speed"] else "baseline"
                each = 1000 * one["wall_median"] / int(count)
                lines.append(f"| {who} | {count} | {each:.1f} | {told} | {found['far'][who]:.1e} |")
        lines.append("")
    for name in [name for name in record if name.startswith("everything")]:
        lines += [*_everything(name, record[name]), ""]
    packages = record["machine"]
    return [*lines, footer("sam", packages)]


def _everything(name: str, found: Mapping[str, Any]) -> list[str]:
    """One picture by both generators: stages, ratio, masks that agree, memory.

    Memory is that of live tensors: a process keeps what loading the weights took, and grows by less than it uses.
    """
    stages = list(dict.fromkeys(stage for times in found["stages"].values() for stage in times if times[stage] > 0))
    title = f"{name}: {found['model']}, {found['points']} x {found['points']} points, {found['masks']} masks"
    lines = [f"| {title} | seconds | {' | '.join(stages)} | : theirs | masks as theirs | least IoU | tensors at once |"]
    lines.append("|---" * (len(stages) + 6) + "|")
    for who, one in found["seconds"].items():
        times = " | ".join(f"{found['stages'][who].get(stage, 0):.2f}" for stage in stages)
        same = found["alike"].get(who)
        told = protocol.shown(found["speed"][who]) if same else "baseline"
        alike = f"{same['common']} of {same['ours']} | {same['least_iou']:.4f}" if same else " | "
        held = f"{found['memory'][who]['tensor_growth'] / 2**20:.0f} MiB" if who in found["memory"] else ""
        lines.append(f"| {who} | {one['wall_median']:.2f} | {times} | {told} | {alike} | {held} |")
    return lines


def thundernet() -> list[str]:
    """Products of the detectors at 320 pixels, counted now, beside the paper's figures."""
    from volvelle.claims.thundernet import BACKBONE, PAPER, costs

    lines = [
        "| backbone | alone at 224 px | its name says | detector at 320 px | the paper | ours : paper |",
        "|---|---|---|---|---|---|",
    ]
    for name, (alone, whole) in costs().items():
        lines.append(
            f"| {name} | {alone:.1f} | {BACKBONE[name]} | {whole:.1f} | {PAPER[name]} | {whole / PAPER[name]:.3f} |"
        )
    return lines


def regions(record: Mapping[str, Any]) -> list[str]:
    """Milliseconds of each operator beside torchvision's, and the mean of the ratios."""
    lines = ["| operator | ours | torchvision | ours : torchvision |", "|---|---|---|---|"]
    for row in record["rows"]:
        told = " | ".join(f"{row['milliseconds'][who]:.1f} ms" for who in ("ours", "torchvision"))
        lines.append(f"| {row['what']} | {told} | {protocol.shown(row['speed'])} |")
    measured = [row for row in record["rows"] if row["speed"]["ratio"] is not None and row["what"][:3] != "nms"]
    mean = f"Geometric mean of the {len(measured)} ratios without nms: {record['geometric_mean']:.2f}. "
    return [*lines, "", mean + footer("regions", record["machine"])]


CAMVID = {
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "boundary_iou": "boundary IoU",
    "miou_of_looks": "mean IoU of all looks",
    "pixel_accuracy_of_looks": "pixel accuracy of all looks",
}
CLICKS = {
    "iou_1": "1 click",
    "iou_2": "2 clicks",
    "iou_3": "3 clicks",
    "iou_5": "5 clicks",
    "best_of_three": "the best of 1 click's three",
    "single": "1 click, asked for one mask",
    "iou_box": "a box",
}
BOXES = {
    "inside": "of a mask's pixels, inside its box",
    "fit": "IoU of the mask's own box with its box",
    "separated": "neighbours apart (a tenth in common at most)",
    "overlap": "in common with a neighbour's mask",
    "boxes_overlap": "the same of the boxes",
    "empty": "boxes without a mask",
}
CODECS = {"psnr": "PSNR, dB", "ssim": "SSIM", "perceptual": "perceptual distance", "used": "share of codes in use"}
PRIORS = {
    "recognised": "recognised by the judge",
    "recognised_codec": "real ones behind the codec",
    "recognised_real": "real ones",
    "distance": "Fréchet distance, judge's features",
    "distance_floor": "its floor",
    "loss": "nats a code",
}
CAPTIONS = {
    "colour": "drawn in the colour asked for",
    "colour_codec": "found in real ones behind the codec",
    "loss": "nats a code, told its caption",
    "loss_untold": "told nothing",
    "loss_mistold": "told another's",
}
BCCD = {"map_50": "mAP at IoU 0.5", "map": "mAP at 0.5 to 0.95"}


def trained(record: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """A line a finished run: what it found on pictures that nothing was chosen by, and how long it took."""
    lines = [f"| run | {' | '.join(columns.values())} | steps | minutes |", "|---" * (len(columns) + 3) + "|"]
    for row in record["runs"]:
        told = " | ".join(f"{row['after'][name]:.3f}" for name in columns)
        on = f" on {row['data']}" if "data" in row else ""
        minutes = f"{row['training_seconds'] / 60:.1f} of {row['seconds'] / 60:.1f}"
        if "alone_steps" in row:
            first, whole = row["alone_steps"], row["steps"] * row["alone_seconds"] / 60
            minutes += f"; {whole:.1f} at the median of its first {first} steps with nothing beside them"
        elif "step_seconds" in row:  # steps of a machine that was busy for a while are told from those of the training
            minutes += f"; {row['steps'] * row['step_seconds'] / 60:.1f} at the median step"
        lines.append(f"| {row['run']}{on}, seed {row['seed']} | {told} | {row['steps']} | {minutes} |")
    machine, dates = record["machine"], sorted({row["date"][:10] for row in record["runs"]})
    return [
        *lines,
        "",
        f"Minutes: of training, of all from start to report, on {machine['cpus']} cores of {machine['cpu']} that were "
        f"not idle beside it; {', '.join(sorted({row['precision'] for row in record['runs']}))}, torch "
        f"{machine['packages']['torch']}, {' and '.join(dates)}. Stored by `python -m benchmarks.trained`.",
    ]


def metrics(record: Mapping[str, Any]) -> list[str]:
    """Milliseconds of one confusion matrix and of torchmetrics, and the ratios."""
    lines = [
        "| masks | ours | without checks | JaccardIndex | without checks | ours : theirs | both without checks |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        who = ("ours", "ours, no checks", "JaccardIndex", "JaccardIndex, no checks")
        times = " | ".join(f"{row['milliseconds'][one]:.1f} ms" for one in who)
        pairs = ("ours : JaccardIndex", "ours, no checks : JaccardIndex, no checks")
        lines.append(
            f"| {row['title']} | {times} | " + " | ".join(protocol.shown(row["speed"][p]) for p in pairs) + " |"
        )
    pair = "ours, an image : MeanIoU"
    told = [
        f"{protocol.shown(row['speed'][pair])} for {row['title']}" for row in record["rows"] if pair in row["speed"]
    ]
    n, y, x = record["shape"]
    about = f"{n} masks of {x} x {y} pixels. Means over (image, class) pairs against MeanIoU: {'; '.join(told)}. "
    return [*lines, "", about + footer("metrics", record["machine"])]
