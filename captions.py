"""Makes a folder of videos into something that train.py trains on: a manifest, and captions.

    python captions.py index VIDEOS --out data.jsonl            # VIDEOS/<label>/<video>, or VIDEOS/<label>.mp4
    python captions.py caption data.jsonl --source label        # the class name as the caption

A manifest is JSON lines, one clip each, `video` relative to the manifest's folder:
    {"video": "clips/a.mp4", "label": "abseiling", "split": "train", "captions": ["..."]}
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import tgmae

VIDEOS = {
    ".mp4",
    ".mkv",
    ".webm",
    ".avi",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".wmv",
    ".3gp",
    ".ogv",
}
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validation": "val",
    "validate": "val",
    "test": "test",
}


# =================================================================================================
# index: a dataset -> records. One function a dataset.
# =================================================================================================


def index_folder(root):
    """ROOT/<label>/<video> or ROOT/<split>/<label>/<video>; a video in ROOT itself: its name is the label."""
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in VIDEOS or not path.is_file():
            continue
        *folders, _ = path.relative_to(root).parts
        split = "train"
        if folders and folders[0].lower() in SPLITS and len(folders) != 1:
            split = SPLITS[folders.pop(0).lower()]
        yield {"video": path, "label": folders[-1] if folders else path.stem, "split": split}


DATASETS = {"folder": index_folder}


def index(args):
    if not args.root.is_dir():
        raise ValueError(f"{args.root}: no such folder")
    records = list(DATASETS[args.dataset](args.root))
    if not records:
        raise ValueError(f"{args.root}: no videos ({' '.join(sorted(VIDEOS))})")
    for record in records:
        record["video"] = os.path.relpath(record["video"], args.out.parent)
    write_manifest(args.out, records)
    for split in sorted({record["split"] for record in records}):
        labels = [record["label"] for record in records if record["split"] == split]
        print(f"{args.out}: {split}: {len(labels)} clips, {len(set(labels))} labels")


# =================================================================================================
# caption: records -> records with captions.
# =================================================================================================


def sentence(label):
    """A class name as a sentence: 'ApplyEyeMakeup', 'apply_eye_makeup' -> 'Apply eye makeup.'"""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", label).replace("_", " ").split()
    text = " ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in words)
    return text[:1].upper() + text[1:] + "."


def caption_label(record):
    if not isinstance(record.get("label"), str) or not record["label"].strip():
        raise ValueError(f"{record['video']}: no label to make a caption of")
    return [sentence(record["label"])]


SOURCES = {"label": caption_label}


def caption(args):
    records = tgmae.read_manifest(args.manifest)
    count = 0
    for record in records:
        if args.force or not record.get("captions"):
            record["captions"] = SOURCES[args.source](record)
            count += 1
    write_manifest(args.manifest, records)
    print(
        f"{args.manifest}: {count} clips captioned, {len(records) - count} had captions already (--force: anew)"
    )


def write_manifest(path, records):
    """Written beside and renamed: a manifest is never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    lines = ({key: value for key, value in record.items() if key != "path"} for record in records)
    partial.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    os.replace(partial, path)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Manifest and captions for train.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("index", help="a dataset on disk -> manifest").add_argument
    add(
        "dataset",
        nargs="?",
        default="folder",
        choices=DATASETS,
        help="how ROOT is laid out (default: folder)",
    )
    add("root", type=Path, help="the folder with the videos")
    add("--out", type=Path, default=Path("data.jsonl"), help="the manifest to write (default: data.jsonl)")
    add = commands.add_parser("caption", help="add captions to a manifest").add_argument
    add("manifest", type=Path, help="JSON lines, as `index` writes them; rewritten in place")
    add("--source", choices=SOURCES, required=True, help="label: the class name as a sentence")
    add("--force", action="store_true", help="replace captions that are already there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()
    try:
        {"index": index, "caption": caption}[args.command](args)
    except (ValueError, OSError) as error:
        sys.exit(f"captions.py: {error}")
