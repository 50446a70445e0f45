"""Makes a dataset's videos into what train.py trains on at full speed: manifest, captions, text
maps.

    # Which clips there are; what they show (3.2); where they show it (3.3):
    python captions.py index k400 VIDEOS --annotations CSVS --out k400.jsonl
    torchrun --nproc_per_node 8 captions.py caption k400.jsonl --source blip2
    torchrun --nproc_per_node 8 captions.py maps k400.jsonl

A manifest is JSON lines, one clip each, `video` and `maps` relative to the manifest's folder:
    {"video": "a.mp4", "label": "abseiling", "split": "train", "captions": ["..."],
     "maps": "maps/a.npz"}

Any command can be killed and run again: it goes on where it stopped. What is done is kept in a
journal, MANIFEST.work/, until all is; only then is the manifest rewritten, at once. A video that
cannot be read is reported, marked "failed" in the manifest, and tried again the next time."""

import argparse
import csv
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path

# Loader processes share the cores with us: threads without work must sleep, not spin. Read when
# torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

import dataset
import tgmae
import weights
from dataset import VideoError
from train import (
    batches_of,
    load_clip,
    naming,
    one_line_errors,
    progress,
    rank_and_world,
    replacing,
    start_processes,
)

VIDEOS = set(".mp4 .mkv .webm .avi .mov .m4v .mpg .mpeg .ts .flv .wmv .3gp .ogv".split())
SPLITS = {name: name for name in ("train", "val", "test")}
SPLITS |= {"training": "train", "validation": "val", "validate": "val"}


# =================================================================================================
# Work that processes share and that survives a kill. Units of work are lists of keys; what became
# of each key is a line in the journal.
# =================================================================================================


def barrier():
    if dist.is_initialized():
        dist.barrier()


class Loading(Dataset):
    """Unit -> [(what load(key) returned, None) or (None, why the video failed) for each of its
    keys]."""

    def __init__(self, units, load):
        self.units, self.load = units, load

    def __len__(self):
        return len(self.units)

    def __getitem__(self, index):
        loaded = []
        for key in self.units[index]:
            try:
                loaded.append((self.load(key), None))
            except VideoError as error:
                loaded.append((None, str(error)))
        return loaded


def itself(key):
    return key


def read_journal(folder):
    """{key: outcome} of what was done, by any process, before and after a kill."""
    outcomes = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                outcome = json.loads(line)
            except json.JSONDecodeError:
                continue  # blank, or cut short by a kill: that unit is done again
            outcomes[outcome.pop("key")] = outcome
    return outcomes


def journal_of(manifest):
    return manifest.with_name(manifest.name + ".work")


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"encoding": "utf-8", "errors": "surrogateescape"}  # names that are no UTF-8
    with replacing(path, "w", **how) as file:
        file.write(text)


def open_journal(folder, settings):
    """Makes the folder, or goes on in it, unless it holds outcomes under other settings:
    ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    then = json.loads(path.read_text()) if path.exists() and read_journal(folder) else settings
    changed = [
        f"{name} {then.get(name)} -> {new}"
        for name, new in settings.items()
        if then.get(name) != new
    ]
    if changed:
        raise ValueError(
            f"{folder} is of an unfinished command with other settings ({', '.join(changed)}): "
            "finish that one with its own flags, or remove the folder"
        )
    write_text(path, json.dumps(settings))


def share(manifest, settings, units, load, compute, *, workers=0, unit="clip"):
    """Does the units of work that the journal does not have yet, shared between torchrun's
    processes.

    `load` (key -> anything; VideoError: that key failed) runs in loader processes, ahead of
    `compute` (keys, what was loaded -> a dict for each, its outcome). -> {key: outcome} of all
    units; the outcome of a failure is {"error": ...}. An unfinished journal of other `settings` is
    a ValueError."""
    rank, world = rank_and_world()
    folder = journal_of(manifest)
    if rank == 0:
        open_journal(folder, settings)
    barrier()
    done = read_journal(folder).keys()
    barrier()  # all have read what was done before any adds to it
    todo = [keys for keys in units if not done >= set(keys)][rank::world]
    loading, workers = Loading(todo, load), min(workers, len(todo))
    loader = batches_of(loading, (workers, 2), batch_size=None, collate_fn=itself)
    name = settings["command"] + (f", one of {world} processes" if world > 1 else "")
    bar = progress(total=sum(map(len, todo)), desc=name, unit=unit, disable=rank > 0)
    with bar, open(folder / f"{rank}.jsonl", "a", encoding="utf-8") as journal:
        journal.write("\n")  # ends a line that a kill cut short
        for keys, loaded in zip(todo, loader):
            lines = [
                {"key": key, "error": why} for key, (_, why) in zip(keys, loaded) if why is not None
            ]
            good = {key: value for key, (value, why) in zip(keys, loaded) if why is None}
            if good:
                outcomes = compute(list(good), list(good.values()))
                lines += [{"key": key} | outcome for key, outcome in zip(good, outcomes)]
            with naming(journal.name):
                journal.write("".join(json.dumps(line) + "\n" for line in lines))
                journal.flush()
            bar.update(len(keys))
    barrier()
    outcomes = read_journal(folder)
    barrier()  # all have read it before rank 0 removes it
    return outcomes


def write_manifest(path, records):
    added = ("path", "map_path")  # by read_manifest
    lines = (
        {key: value for key, value in record.items() if key not in added} for record in records
    )
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def keys_of(records):
    """A key for each record, that does not change when others are added or captioned."""
    seen, keys = Counter(), []
    for record in records:
        clip = json.dumps([record["video"], record.get("start"), record.get("end")])
        seen[clip] += 1
        keys.append(hashlib.sha256(f"{clip} {seen[clip]}".encode()).hexdigest()[:16])
    return keys


def report(manifest, command, problems):
    """Lists the problems beside the manifest, and says so."""
    listed = manifest.with_name(f"{manifest.stem}.{command}-problems.txt")
    listed.unlink(missing_ok=True)
    if problems:
        write_text(listed, "".join(line + "\n" for line in problems))
        print(f"{len(problems)} problem(s), listed in {listed}:\n  " + "\n  ".join(problems[:5]))


def conclude(manifest, command, outcomes, update):
    """On rank 0: puts the outcomes into the manifest, by update(key, record, outcome), or marks as
    failed; closes the journal. The manifest is read again: hours may have passed, and others may
    have added to it. ValueError if all failed."""
    if rank_and_world()[0]:
        return
    records, failures, done = list(dataset.read_manifest(manifest)), [], 0
    for key, record in zip(keys_of(records), records):
        if key not in outcomes:
            continue
        if "error" in outcomes[key]:
            record["failed"] = outcomes[key]["error"]
            failures.append(f"{record['video']}\t{record['failed']}")
        else:
            record.pop("failed", None)
            update(key, record, outcomes[key])
            done += 1
    write_manifest(manifest, records)
    shutil.rmtree(journal_of(manifest), ignore_errors=True)
    report(manifest, command, failures)
    left = len(records) - done - len(failures)
    print(f"{manifest}: {command}: {done} clips, {len(failures)} failed; {left} left as they were")
    if failures and not done:
        raise ValueError(f"{manifest}: all {len(failures)} clips failed, the first: {failures[0]}")


# =================================================================================================
# index: a dataset's own annotation files -> records. One generator a dataset, of (the video's name,
# record); the record's video is None where the file is missing.
# =================================================================================================


class Annotations:
    """Reads annotation files; `where` is what was read last, for whoever has to complain about
    it."""

    def __init__(self, folder):
        self.folder, self.where = folder, str(folder)

    def path(self, *names, needed=True):
        """The first of the names that is there; None if it is not needed."""
        path = next((self.folder / name for name in names if (self.folder / name).exists()), None)
        if needed and not path:
            self.where = str(self.folder)
            raise ValueError(f"there is no {' or '.join(names)}")
        self.where = str(path)
        return path

    def lines(self, path):
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            self.where = f"{path}:{number}"
            if line.strip():
                yield line.strip()

    def json(self, path):
        return json.loads(path.read_text(encoding="utf-8-sig"))

    def rows(self, path):
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for row in reader:
                self.where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"not the header's {len(reader.fieldnames)} fields")
                yield row

    def entries(self, path):
        for number, entry in enumerate(self.json(path), 1):
            self.where = f"{path}: entry {number}"
            yield entry


def videos_under(root):
    """Videos below a folder, also through links; not hidden ones (.ipynb_checkpoints/a.mp4,
    ._a.mp4), nor those below a folder that is its own ancestor, by a link."""
    for folder, folders, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        above = {real, *real.parents, *(p.resolve() for p in Path(folder).parents)}
        folders[:] = sorted(name for name in folders if name[0] != ".")
        folders[:] = [name for name in folders if Path(folder, name).resolve() not in above]
        shown = sorted(name for name in names if name[0] != ".")
        yield from (Path(folder, name) for name in shown if Path(name).suffix.lower() in VIDEOS)


def finder(root):
    """-> find(stem, *hints): the video under root with that name, whatever its folder and suffix;
    of several, the one whose folders have the most of the hints (label, split), and .mp4 before
    others."""

    def plain(text):
        return text.lower().replace(" ", "_")

    table = defaultdict(list)
    for path in videos_under(root):
        table[path.stem].append(path)

    def find(stem, *hints):
        def likeness(path):
            alike = set(map(plain, hints)) & set(map(plain, path.parts))
            size = path.stat().st_size if path.exists() else 0
            return len(alike), path.suffix == ".mp4", size

        return max(table.get(stem, ()), key=likeness, default=None)

    return find


def human_captions(text):
    if not text.strip():
        raise ValueError("an empty caption")
    return [text.strip()]


def index_k400(args, files, find):
    """train.csv, validate.csv (or val.csv), test.csv; videos <id>_<start>_<end>, or <id>, trimmed
    as well."""
    files.path("train.csv", "validate.csv", "val.csv", "test.csv")  # one of them there must be
    parts = ("train.csv",), ("validate.csv", "val.csv"), ("test.csv",)
    for path in filter(None, [files.path(*names, needed=False) for names in parts]):
        for row in files.rows(path):
            youtube, split, label = row["youtube_id"], SPLITS[row["split"]], row.get("label")
            name = f"{youtube}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
            # By its full name a file is that clip, wherever it lies: the larger one, if one of
            # several was cut short.
            video = find(name) or find(youtube, label or "", split)
            yield name, {"video": video, "split": split} | ({"label": label} if label else {})


def index_ssv2(args, files, find):
    """something-something-v2-{train,validation,test,labels}.json, or without that prefix. The test
    split has no labels, and not everybody has it."""
    old = "something-something-v2-"
    labels = files.json(files.path(f"{old}labels.json", "labels.json"))
    for part in ("train", "validation", "test"):
        path = files.path(f"{old}{part}.json", f"{part}.json", needed=part != "test")
        for entry in files.entries(path) if path else ():
            record = {"video": find(str(entry["id"])), "split": SPLITS[part]}
            if part != "test":
                label = entry["template"].replace("[", "").replace("]", "")
                record |= {"label": label, "class_id": int(labels[label])}
                record |= {"human_captions": human_captions(entry["label"])}
            yield str(entry["id"]), record


def index_ucf101(args, files, find):
    """trainlist01.txt, testlist01.txt (--fold: 01, 02, 03) and classInd.txt."""
    numbered = (line.split() for line in files.lines(files.path("classInd.txt")))
    classes = {name: int(number) for number, name in numbered}
    for split in ("train", "test"):
        for line in files.lines(files.path(f"{split}list0{args.fold}.txt")):
            path, _, given = line.partition(" ")
            label = path.split("/")[0]
            if given and int(given) != classes[label]:
                raise ValueError(
                    f"class {given}, but classInd.txt says that {label} is {classes[label]}"
                )
            record = {"video": find(Path(path).stem, label), "label": label, "split": split}
            yield path, record | {"class_id": classes[label] - 1}


def index_hmdb51(args, files, find):
    """<class>_test_split1.txt (--fold: 1, 2, 3), a file a class; 1 is train, 2 test, 0 unused."""
    ending = f"_test_split{args.fold}.txt"
    paths = sorted(files.folder.glob("*" + ending)) or [files.path("*" + ending)]  # none: says so
    for path in paths:
        label = path.name.removesuffix(ending)
        for line in files.lines(path):
            name, _, code = line.rpartition(" ")
            split = {"1": "train", "2": "test", "0": None}[code]
            if split:
                video = find(Path(name.strip()).stem, label)
                yield f"{label}/{name.strip()}", {"video": video, "label": label, "split": split}


def index_diving48(args, files, find):
    """Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json. A file is a dive: its
    start and end frames are the file's."""
    vocab = list(files.entries(files.path("Diving48_vocab.json")))
    classes = {
        i: words if isinstance(words, str) else " ".join(words) for i, words in enumerate(vocab)
    }
    for split in ("train", "test"):
        for entry in files.entries(files.path(f"Diving48_V2_{split}.json")):
            name, class_id = entry["vid_name"], entry["label"]
            record = {
                "video": find(name),
                "label": classes[class_id],
                "class_id": class_id,
                "split": split,
            }
            yield name, record


def index_epic55(args, files, find):
    """EPIC_train_action_labels.csv with EPIC_verb_classes.csv and EPIC_noun_classes.csv: segments
    of long videos. The public test set has no labels: participants 26 to 31 are held out (split
    val), as Baradel et al. (ECCV 2018) do."""
    verbs, nouns = (
        {
            row[f"{kind}_id"]: row["class_key"]
            for row in files.rows(files.path(f"EPIC_{kind}_classes.csv"))
        }
        for kind in ("verb", "noun")
    )
    for row in files.rows(files.path("EPIC_train_action_labels.csv")):
        spans = {}
        for key, column in (("start", "start_timestamp"), ("end", "stop_timestamp")):
            hours, minutes, seconds = row[column].split(":")
            spans[key] = round(3600 * int(hours) + 60 * int(minutes) + float(seconds), 3)
        participant = row["participant_id"]
        yield (
            row["video_id"],
            {
                "video": find(row["video_id"], participant),
                "label": f"{verbs[row['verb_class']]} {nouns[row['noun_class']]}",
                "split": "val" if int(participant.removeprefix("P")) >= 26 else "train",
                "human_captions": human_captions(row["narration"]),
                **spans,
            },
        )


def index_list(args, files, find):
    """`path label` a line, separated by a blank, tab or comma: VideoMAE's and mmaction2's lists. A
    file, or a folder of them; the split is what the file's name says (train otherwise). The path is
    absolute or under ROOT. --classes: the names of integer labels, a line each."""
    names = dict(enumerate(files.lines(args.classes))) if args.classes else None
    folder = files.folder
    paths = [folder] if folder.is_file() else sorted({*folder.glob("*.csv"), *folder.glob("*.txt")})
    endings = "|".join(re.escape(suffix) for suffix in sorted(VIDEOS))
    # Where the path ends in a known suffix the label may have blanks; it is one word otherwise.
    forms = rf'"?(.+?(?:{endings}))"?[\s,]+(.+)', r'"?(.+?)"?[\s,]+([^\s,]+)'
    for path in paths or [files.path("*.csv", "*.txt")]:  # none: says so
        known = [SPLITS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLITS]
        for line in files.lines(path):
            match = next(filter(None, (re.fullmatch(form, line, re.I) for form in forms)), None)
            if not match:
                raise ValueError(f"not `path label`: {line[:80]}")
            name, label = match.groups()
            label = re.sub(r"^-?\d+[\s,]+(?=[^\s,]+$)", "", label)  # `path frames label`
            record = {
                "video": Path(args.root, name),
                "label": label,
                "split": (known + ["train"])[0],
            }
            if label == "-1":  # none
                del record["label"]
            if label.isdigit():
                record |= {"class_id": int(label), "label": names[int(label)] if names else label}
            yield name, record | ({} if record["video"].is_file() else {"video": None})


def index_folder(args, files, find):
    """ROOT/<label>/<video> or ROOT/<split>/<label>/<video>; a video in ROOT itself: its name is the
    label."""
    for path in videos_under(args.root):
        *folders, name = path.relative_to(args.root).parts
        files.where, split = str(path), "train"
        if len(folders) > 1 and folders[0].lower() in SPLITS:
            split = SPLITS[folders.pop(0).lower()]
        yield name, {"video": path, "label": folders[-1] if folders else path.stem, "split": split}


DATASETS = {
    "folder": index_folder, "list": index_list, "k400": index_k400, "ssv2": index_ssv2,
    "ucf101": index_ucf101,
    "hmdb51": index_hmdb51, "diving48": index_diving48, "epic55": index_epic55,
}  # fmt: skip


def read_annotations(args):
    """-> [(where it says so, the video's name, record)]; what is wrong with a file is a ValueError
    that names file and line."""
    files, rows = Annotations(args.annotations or args.root), []
    find = finder(args.root) if args.dataset not in ("folder", "list") else None
    try:
        for name, record in DATASETS[args.dataset](args, files, find):
            rows.append((files.where, name, record))
    except KeyError as error:
        raise ValueError(f"{files.where}: {error} is unknown or missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{files.where}: {error}") from error
    if not any(record["video"] for *_, record in rows):
        missing = (
            f", none of the {len(rows)} in the annotations, such as {rows[0][1]}" if rows else ""
        )
        raise ValueError(f"{args.root}: no videos ({' '.join(sorted(VIDEOS))}){missing}")
    return rows


def relative(path, folder):
    """The path of a file as seen from a folder. If that leads nowhere, since the folder is a link
    to another place, folders are resolved; a file that is itself a link keeps its name."""
    written = os.path.relpath(path, folder)
    if os.path.isdir(folder) and not os.path.exists(os.path.join(folder, written)):
        away, name = os.path.split(os.path.abspath(path))
        path, folder = os.path.join(os.path.realpath(away), name), os.path.realpath(folder)
    return os.path.relpath(path, folder)


def index(args):
    if not args.root.is_dir():
        raise ValueError(f"{args.root}: no such folder")
    if args.out.exists() and not args.force:
        raise ValueError(f"{args.out}: exists, perhaps with captions; --force writes it anew")
    barrier()  # all have looked before the first writes it
    rows = read_annotations(args)
    paths = list(dict.fromkeys(str(record["video"]) for *_, record in rows if record["video"]))
    empty = (path for path in paths if not os.path.isfile(path) or not os.path.getsize(path))
    unreadable = {path: f"{path}: empty, or a link to nothing" for path in empty}
    if rank_and_world()[0]:
        return
    found, problems, table = [], [], defaultdict(Counter)
    for where, name, record in rows:
        video = str(record["video"])
        if record["video"] is None:
            state, reason = "missing", f"no video {name}"
        elif video in unreadable:
            state, reason = "unreadable", unreadable[video]
        else:
            state, reason = "found", ""
            found.append(record | {"video": relative(video, args.out.parent)})
        table[record["split"]][state] += 1
        problems += [f"{state}\t{where}\t{reason}"] if reason else []
    for split, states in sorted(table.items()):
        labels = {record.get("label") for record in found if record["split"] == split} - {None}
        counts = ", ".join(
            f"{states[state]} {state}" for state in ("found", "missing", "unreadable")
        )
        print(f"{args.out}: {split}: {counts}; {len(labels)} labels")
    report(args.out, "index", problems)
    if found:
        write_manifest(args.out, found)
    if not found:
        raise ValueError(f"{args.root}: none of {len(rows)} videos can be read")


# =================================================================================================
# caption: records -> records with captions.
# =================================================================================================

PROMPTS = (  # the paper's Figure 5(a)
    "Describe the action {}.",
    "What does a person {} look like?",
    "What does the act of {} look like?",
)


def phrase(label):
    """A class name in words: 'ApplyEyeMakeup', 'apply_eye_makeup' -> 'apply eye makeup'; EPIC's
    'board:chopping' -> 'chopping board'. Abbreviations stay."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ")
    text = re.sub(r"(\S+?):(\S+)", lambda match: f"{match[2].replace(':', ' ')} {match[1]}", text)
    return " ".join(
        word if word.isupper() and len(word) > 1 else word.lower() for word in text.split()
    )


def sentence(label):
    text = phrase(label)
    return text[:1].upper() + text[1:] + "."


def caption_label(record):
    """The oracle of the paper's Figure 5(b): the class name as a sentence."""
    label = str(record.get("label") or "").strip()
    if not label:
        return {"error": "no label"}
    if label.isdigit():
        return {
            "error": f"label {label} is a number, not a name: index list --classes FILE names it"
        }
    return {"captions": [sentence(label)]}


def caption_human(record):
    """What the dataset itself says. It gives the class away: the paper does without it."""
    said = record.get("human_captions")
    return {"captions": said} if said else {"error": "no human_captions"}


def keyframes(first, stop, count):
    """`count` numbers spread evenly over [first, stop): the middles of as many equal parts."""
    return [first + (2 * i + 1) * (stop - first) // (2 * count) for i in range(count)]


def load_keyframes(records, count, key):
    record = records[key]
    with dataset.open_video(record["path"]) as video:
        span = dataset.frame_range(video, record.get("start"), record.get("end"))
        return dataset.read_clip(video, keyframes(*span, count))


def from_pretrained(kind, model, **more):
    """A transformers class from a hub name or a local folder; ValueError with the ways out."""
    online = Path(model).is_dir() or weights.work_offline_if_no_hub()
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(model, **more)
    except (OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if online else "the hub cannot be reached"
        raise ValueError(
            f"--model {model}: {reason}. Way out: --model FOLDER, a downloaded one"
        ) from error


def captions_or_error(texts, who):
    captions = [" ".join(text.split()) for text in texts if text.strip()]
    return {"captions": captions} if captions else {"error": f"{who} wrote nothing"}


class Captioner:
    """A transformers model, loaded when there is something to do."""

    def __init__(self, args):
        self.args, self.device = args, args.device
        self.dtype = torch.bfloat16 if tgmae.bf16_is_fast(args.device) else torch.float32

    @functools.cached_property
    def model(self):
        model = from_pretrained(self.kind, self.args.model, dtype=self.dtype)
        return model.eval().to(self.device)


class Blip2(Captioner):
    """Keyframes -> a caption each (3.2), greedily, as BLIP-2's own generate does by default."""

    kind = "Blip2ForConditionalGeneration"

    @functools.cached_property
    def processor(self):
        return from_pretrained("Blip2Processor", self.args.model)

    @torch.no_grad()
    def __call__(self, keys, clips):
        images = [Image.fromarray(frame.numpy()) for clip in clips for frame in clip]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device, self.dtype)
        config, more = self.model.config, {}
        if (
            config.text_config.is_encoder_decoder
        ):  # a T5 has no token to start from: an empty prompt
            prompt = [config.image_token_index] * config.num_query_tokens
            prompt = torch.tensor([prompt + [config.text_config.eos_token_id]] * len(pixels))
            more["input_ids"] = prompt.to(self.device)
        length = self.args.max_new_tokens
        said = self.model.generate(pixel_values=pixels, max_new_tokens=length, **more)
        said = self.processor.batch_decode(said, skip_special_tokens=True)
        each = len(said) // len(clips)
        return [
            captions_or_error(said[i * each : (i + 1) * each], "BLIP-2") for i in range(len(clips))
        ]


class Llm(Captioner):
    """A class name -> what the model says of it: the paper's three prompts, several answers to
    each."""

    kind = "AutoModelForCausalLM"

    @functools.cached_property
    def tokenizer(self):
        return from_pretrained("AutoTokenizer", self.args.model)

    @torch.no_grad()
    def answers(self, prompt):
        tokenizer = self.tokenizer
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            tokens = tokenizer.apply_chat_template(chat, **how)
        else:
            tokens = tokenizer(prompt, return_tensors="pt")
        tokens = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        # Seeded by what is asked: who asks, and what was asked before, makes no difference.
        torch.manual_seed(
            int(hashlib.sha256(f"{self.args.seed} {prompt}".encode()).hexdigest()[:15], 16)
        )
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        said = self.model.generate(
            **tokens,
            do_sample=True,
            num_return_sequences=self.args.per_prompt,
            pad_token_id=pad,
            max_new_tokens=self.args.max_new_tokens,
        )
        return tokenizer.batch_decode(
            said[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def __call__(self, keys, labels):
        asked = ([prompt.format(phrase(label)) for prompt in PROMPTS] for label in labels)
        return [
            captions_or_error(sum(map(self.answers, prompts), []), "the LLM") for prompts in asked
        ]


def caption(args):
    records = list(dataset.read_manifest(args.manifest))
    wanted = dict(zip(keys_of(records), records))
    if not (args.force or args.append):
        wanted = {key: record for key, record in wanted.items() if not record.get("captions")}
    names = (
        "command source model frames batch_size per_prompt max_new_tokens seed append force".split()
    )
    args.model = args.model or MODELS.get(args.source)
    settings, keys = {name: getattr(args, name) for name in names}, list(wanted)
    if args.source == "blip2":
        # The batches do not depend on who computes them, nor on what was done before a kill.
        units = [keys[i : i + args.batch_size] for i in range(0, len(keys), args.batch_size)]
        load = functools.partial(load_keyframes, wanted, args.frames)
        said = share(args.manifest, settings, units, load, Blip2(args), workers=args.workers)
    elif args.source == "llm":
        named = {key: caption_label(wanted[key]) for key in keys}
        labels = {key: str(wanted[key].get("label")) for key in keys}
        asked = sorted({labels[key] for key in keys if "captions" in named[key]})
        by_label = share(
            args.manifest, settings, [[x] for x in asked], itself, Llm(args), unit="class"
        )
        said = {key: by_label.get(labels[key], named[key]) for key in keys}
    else:
        source = {"label": caption_label, "human": caption_human}[args.source]
        units = [keys] if keys else []  # a moment's work: one process does it all
        said = share(
            args.manifest,
            settings,
            units,
            itself,
            lambda keys, _: [source(wanted[k]) for k in keys],
        )

    def update(key, record, outcome):
        before = record.get("captions", []) if args.append else []
        record["captions"] = before + [text for text in outcome["captions"] if text not in before]

    conclude(args.manifest, "caption", {key: said[key] for key in keys}, update)


# =================================================================================================
# maps: records with captions -> the similarity of every patch of every `--every`th frame to every
# caption, so that training needs no CLIP.
# =================================================================================================

PIECE = 32  # frames held at full size at a time


def clip_id(args, clip):
    """Model, weights, and the first digits of the weights' SHA-256: two CLIPs of one name are told
    apart."""
    digest = hashlib.sha256()
    for _, value in sorted(
        clip.state_dict().items()
    ):  # rounded alike, whatever precision it runs in
        digest.update(value.cpu().bfloat16().reshape(-1).view(torch.uint8).numpy())
    return f"{dataset.clip_name(args.clip, args.clip_pretrained)} {digest.hexdigest()[:12]}"


def map_size(size, image_size, patch_size):
    """(H,W) of a frame -> (H',W'): the short side image_size, both rounded to whole patches."""
    return [max(1, round(side * image_size / min(size) / patch_size)) * patch_size for side in size]


def map_numbers(video, record, every):
    """Numbers of the frames that the map of a clip holds."""
    return list(range(*dataset.frame_range(video, record.get("start"), record.get("end")), every))


def is_current(args, path, record, made_by, numbers):
    """Whether the wanted map is there. Half a map, or one of other captions, is made anew; one of
    another CLIP or geometry may be wanted by somebody: ValueError."""
    try:
        saved = dataset.read_map(path, record["captions"])
    except ValueError:  # none at all, most often
        return False
    resized = map_size(saved.size, args.image_size, args.patch_size)
    for what, old, new in (
        ("CLIP", saved.clip, made_by), ("size", list(saved.resized), resized),
        ("patch size", saved.patch_size, args.patch_size),
        ("frames", saved.frames.tolist(), numbers),
    ):  # fmt: skip
        if old != new:
            change = f"{str(old)[:60]}, now {str(new)[:60]}"
            raise ValueError(f"{path}: {what} {change}; --force makes all anew")
    return True


def load_frames(args, made_by, clips, paths, key):
    """-> numbers, frames (F,3,H',W') uint8, size of the source; None if its map is there
    already."""
    record, images = clips[key], []
    with dataset.open_video(record["path"]) as video:
        numbers = map_numbers(video, record, args.every)
        if not args.force and is_current(args, paths[key], record, made_by, numbers):
            return None
        for i in range(0, len(numbers), PIECE):
            frames = dataset.read_clip(video, numbers[i : i + PIECE])
            size = tuple(frames.shape[1:3])
            resized = map_size(size, args.image_size, args.patch_size)
            images.append(TF.resize(frames.permute(0, 3, 1, 2), resized, antialias=True))
    return numbers, torch.cat(images), size


@torch.no_grad()
def similarity_map(clip, frames, text, patch_size, device):
    """frames (F,3,H',W') uint8, text (captions,E) -> (captions,F,h',w'), of one clip by itself."""
    chunk = 64 if device == "cpu" else 1024
    parts = []
    for piece in frames.split(PIECE):
        patches = tgmae.patch_embeddings(
            clip, piece.to(device).float() / 255, patch_size, chunk=chunk
        )
        parts.append((patches @ text.T).cpu())  # (F,h',w',captions)
    return torch.cat(parts).permute(3, 0, 1, 2)


def make_map(args, clip, tokenizer, made_by, clips, paths, keys, loaded):
    """(numbers, frames, size) of clips -> their maps, written; nothing where they are there."""
    for key, value in zip(keys, loaded):
        if value is None:
            continue
        numbers, frames, size = value
        captions = clips[key]["captions"]
        text = tgmae.encode_text(clip, tokenizer, captions)
        similarity = similarity_map(clip, frames, text, args.patch_size, args.device)
        path = paths[key]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(
                file,
                similarity=similarity.half().numpy(),
                frames=np.array(numbers),
                text=text.half().cpu().numpy(),
                captions=np.array(captions),
                clip=np.array(made_by),
                source_size=np.array(size),
                resized_size=np.array(frames.shape[-2:]),
                patch_size=np.array(args.patch_size),
            )
    return [{} for _ in keys]


def maps(args):
    records = list(dataset.read_manifest(args.manifest))
    clips, paths = {}, {}
    for key, record in zip(keys_of(records), records):
        if record.get("captions"):
            digest = hashlib.sha256(f"{args.manifest.name} {key}".encode()).hexdigest()[:16]
            clips[key] = record
            named = f"maps/{digest[:2]}/{Path(record['video']).stem}-{digest[2:]}.npz"  # formerly
            named = named if record.get("maps") == named else f"maps/{digest[:2]}/{digest[2:]}.npz"
            paths[key] = args.manifest.parent / named
    if not clips:
        raise ValueError(f"{args.manifest}: no clip has captions; captions.py caption makes them")
    if args.image_size % args.patch_size:
        raise ValueError(
            f"--image-size {args.image_size} is not divisible by --patch-size {args.patch_size}"
        )
    clip = load_clip(args.clip, args.clip_pretrained, args.device)
    made_by = clip_id(args, clip[0])
    names = "command every image_size patch_size force".split()
    settings = {name: getattr(args, name) for name in names} | {"clip": made_by}
    made = share(
        args.manifest,
        settings,
        [[key] for key in clips],
        functools.partial(load_frames, args, made_by, clips, paths),
        functools.partial(make_map, args, *clip, made_by, clips, paths),
        workers=args.workers,
    )

    def update(key, record, outcome):
        record["maps"] = os.path.relpath(paths[key], args.manifest.parent)

    conclude(args.manifest, "maps", {key: made[key] for key in clips}, update)


# =================================================================================================
# Command line.
# =================================================================================================

MODELS = {"blip2": "Salesforce/blip2-opt-2.7b", "llm": "Qwen/Qwen2.5-1.5B-Instruct"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Manifest, captions and text maps for train.py.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help):
        parser = commands.add_parser(name, help=help, description=help)

        def add(flag, help, **more):
            default = " (default: %(default)s)" if more.get("default") is not None else ""
            parser.add_argument(flag, help=help + default, **more)

        return add

    def shared(add, force):
        add(
            "--workers",
            "loader processes per process",
            type=int,
            default=min(8, os.cpu_count() or 1),
        )
        add("--force", force, action="store_true")

    add = command("index", "a dataset's videos and annotation files -> manifest")
    add("dataset", "whose annotation files to read", nargs="?", default="folder", choices=DATASETS)
    add("root", "the folder with the videos", type=Path)
    add(
        "--annotations",
        "folder of the annotation files (default: root); list: a file, or a folder of them",
        type=Path,
    )
    add("--fold", "which split of ucf101 and hmdb51", type=int, default=1, choices=(1, 2, 3))
    add("--classes", "list: file with the names of integer labels, a line each, from 0", type=Path)
    add("--out", "the manifest to write", type=Path, default=Path("data.jsonl"))
    shared(add, "overwrite the manifest")

    add = command("caption", "captions for the clips of a manifest that have none")
    add("manifest", "JSON lines, as `index` writes them; rewritten at the end", type=Path)
    sources = (
        "BLIP-2 on keyframes, the class name, an LLM that is told the class name, or human_captions"
    )
    add("--source", sources, required=True, choices=("blip2", "label", "llm", "human"))
    models = ", ".join(f"{source}: {model}" for source, model in MODELS.items())
    add("--model", f"hub name or folder for transformers (default: {models})")
    add("--frames", "blip2: keyframes, a caption each (1: the centre frame)", type=int, default=3)
    add("--batch-size", "blip2: clips per forward", type=int, default=8)
    add("--per-prompt", "llm: answers to each of the three prompts", type=int, default=3)
    add("--max-new-tokens", "longest caption, in the model's tokens", type=int, default=60)
    add("--seed", "llm: of the sampling", type=int, default=0)
    add(
        "--append",
        "add to the captions that are there (the paper's BLIP + GPT)",
        action="store_true",
    )
    shared(add, "replace captions that are there")

    add = command(
        "maps", "text maps of the clips that have captions: CLIP once, instead of at every step"
    )
    add("manifest", "JSON lines with captions; rewritten at the end, maps/ beside it", type=Path)
    add("--clip", "open_clip model, hf-hub:NAME or local-dir:FOLDER", default="ViT-B-32-quickgelu")
    add("--clip-pretrained", "tag of open_clip, or a file of weights", default="openai")
    add("--every", "frames from one mapped frame to the next", type=int, default=8)
    add("--image-size", "the frame's short side in pixels, as the model's", type=int, default=224)
    add("--patch-size", "pixels, as the model's patch_size", type=int, default=16)
    shared(add, "make maps anew that are there")

    parser.set_defaults(device="auto", amp=None)  # which start_processes settles
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = 0 if name in ("workers", "seed") else 1
        if type(value) is int and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.command == "caption" and args.append and args.force:
        parser.error("--append and --force exclude each other")
    return args


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors("captions.py", "a smaller --batch-size, --model or --clip"):
        # On the CPU: what they tell each other is little, and the slowest may need days longer.
        start_processes(args, "gloo", timedelta(days=30))
        {"index": index, "caption": caption, "maps": maps}[args.command](args)
        barrier()


if __name__ == "__main__":
    main()
