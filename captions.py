"""Makes a dataset's videos into what train.py trains on at full speed: manifest, captions, text
maps.

    # Which clips there are; what they show (3.2); where they show it (3.3):
    python captions.py index k400 VIDEOS --annotations CSVS --out k400.jsonl
    torchrun --nproc_per_node 8 captions.py caption k400.jsonl --source blip2
    torchrun --nproc_per_node 8 captions.py maps k400.jsonl

A manifest is JSON lines, one clip each, `video` and `maps` relative to the manifest's folder:
    {"video": "a.mp4", "label": "abseiling", "split": "train", "captions": ["..."],
     "maps": "maps/a.npz"}

Any command can be killed and run again; `caption` and `maps` go on where they stopped. What is done
is kept in MANIFEST.work/ until all is; only then is the manifest rewritten, at once. A video that
cannot be read is reported, marked "failed" in the manifest, and tried again the next time."""

import csv
import functools
import hashlib
import itertools
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
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import dataset
import runs
import tgmae
import weights
from dataset import UserError, VideoError

SPLITS = {name: name for name in ("train", "val", "test")}
SPLITS |= {"training": "train", "validation": "val", "validate": "val"}  # in annotation files
SPLIT_WORDS = SPLITS | {"valid": "val", "dev": "val", "testing": "test"}  # in people's own names


# ==== index =======================================================================================
# A dataset's own annotation files -> records. One generator a dataset, of (the video's name,
# record); the record's video is None where the file is missing.
class Annotations:
    """Reads annotation files; `where` is what was read last, for whoever has to complain about
    it."""

    def __init__(self, folder):
        self.folder, self.where = folder, str(folder)
        self.others = []  # files under ROOT that are no videos

    def path(self, *names, needed=True):
        """The first of the names that is there; None if it is not needed."""
        path = next((self.folder / name for name in names if (self.folder / name).exists()), None)
        self.where = str(path or self.folder)
        if needed and not path:
            raise UserError(f"there is no {' or '.join(names)}")
        return path

    def lines(self, path):
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            self.where = f"{path}:{number}"
            if line.strip():
                yield line.strip()

    def rows(self, path):
        self.where = str(path)
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for row in reader:
                self.where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"not the header's {len(reader.fieldnames)} fields")
                yield row

    def entries(self, path):
        for number, entry in enumerate(json.loads(path.read_text(encoding="utf-8-sig")), 1):
            self.where = f"{path}: entry {number}"
            yield entry


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
    path = files.path(f"{old}labels.json", "labels.json")
    labels = json.loads(path.read_text(encoding="utf-8-sig"))
    for part in ("train", "validation", "test"):
        path = files.path(f"{old}{part}.json", f"{part}.json", needed=part != "test")
        for entry in files.entries(path) if path else ():
            record = {"video": find(str(entry["id"])), "split": SPLITS[part]}
            if part != "test":
                label = entry["template"].replace("[", "").replace("]", "")
                record |= {"label": label, "class_id": int(labels[label])}
                record |= {"human_captions": [entry["label"].strip()]}
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
                raise UserError(
                    f"class {given}, but classInd.txt says that {label} is {classes[label]}"
                )
            record = {"video": find(Path(path).stem, label), "label": label, "split": split}
            yield path, record | {"class_id": classes[label] - 1}


def index_hmdb51(args, files, find):
    """<class>_test_split1.txt (--fold: 1, 2, 3), a file a class; 1 is train, 2 test, 0 unused."""
    ending = f"_test_split{args.fold}.txt"
    paths = sorted(files.folder.glob("[!.]*" + ending)) or [files.path("*" + ending)]  # says so
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
    vocab = files.entries(files.path("Diving48_vocab.json"))
    classes = dict(enumerate(w if isinstance(w, str) else " ".join(w) for w in vocab))
    for split in ("train", "test"):
        for entry in files.entries(files.path(f"Diving48_V2_{split}.json")):
            record = {"video": find(entry["vid_name"]), "label": classes[entry["label"]]}
            yield entry["vid_name"], record | {"class_id": entry["label"], "split": split}


def index_epic55(args, files, find):
    """EPIC_train_action_labels.csv with EPIC_verb_classes.csv and EPIC_noun_classes.csv: segments
    of long videos. The public test set has no labels: participants 26 to 31 are held out (split
    val), as Baradel et al. (ECCV 2018) do."""
    names = {}
    for kind in ("verb", "noun"):
        for row in files.rows(files.path(f"EPIC_{kind}_classes.csv")):
            names[kind, row[f"{kind}_id"]] = row["class_key"]
    for row in files.rows(files.path("EPIC_train_action_labels.csv")):
        participant = row["participant_id"]
        record = {"video": find(row["video_id"], participant)}
        record["label"] = " ".join(names[kind, row[f"{kind}_class"]] for kind in ("verb", "noun"))
        record["split"] = "val" if int(participant.removeprefix("P")) >= 26 else "train"
        for key in ("start", "stop"):
            hours, minutes, seconds = row[f"{key}_timestamp"].split(":")
            time = round(3600 * int(hours) + 60 * int(minutes) + float(seconds), 3)
            record["end" if key == "stop" else key] = time
        yield row["video_id"], record | {"human_captions": [row["narration"].strip()]}


def split_words(name):
    """The words in a name that stand for a split: 'ucf101_testlist01' -> {'test'}."""
    words = re.findall("[a-z]+", name.lower())
    return {word.removesuffix("list") for word in words} & SPLIT_WORDS.keys()


def path_and_label(line):
    """`path label` or `path frames label` -> path, label. What follows the path is columns of CSV
    if a comma, a tab or quotes say so, and words otherwise."""
    endings = "|".join(re.escape(suffix) for suffix in dataset.VIDEOS)
    # In quotes; or up to a known suffix; or one of two columns; or all but the last word.
    paths = rf'"(?:[^"]|"")+"|[^"]+(?:{endings})|[^",\t]+(?=[,\t]\s*(?:".+"|[^,\t]+)$)|.+'
    match = re.fullmatch(rf"({paths})\s*([\s,])\s*(.+)", line, re.IGNORECASE)
    path, mark, rest = match.groups() if match else ("", "", '""')
    mark = mark if mark in (",", "\t") else " "
    row = next(csv.reader([rest], delimiter=mark, skipinitialspace=True, strict=True))
    words = mark == " " or ", " in rest  # `riding a bike`, or behind a comma `cooking, outdoors`
    if len(row) == 2 and re.fullmatch(r"-?\d+(\.0*)?\s*", row[0]):
        del row[0]  # a number of frames
    elif words and not re.search(r'["\t]|^(-?[\d.]+[\s,]+){2}', rest):  # no `start frames label`
        row = [rest]
    if len(row) > 1 or not row[0].strip():
        raise UserError(f"not `path label` or `path frames label`: {line[:80]}")
    return path.strip('"').replace('""', '"'), row[0].strip()


def index_list(args, files, find):
    """`path label` a line, see path_and_label: VideoMAE's and mmaction2's lists, and CSV. A file,
    or a folder of .csv, .tsv, .txt; the split is what the file's name says (train otherwise). The
    path is absolute or under ROOT. --classes: the names of integer labels, a line each."""
    names = None
    if args.classes:
        text, files.where = args.classes.read_text(encoding="utf-8-sig"), str(args.classes)
        lines = [line.strip() for line in text.rstrip().split("\n")]
        numbered = all(re.match(r"\d+\s+\S", line) for line in lines)
        if numbered or "" in lines or len(set(lines)) < len(lines):
            raise UserError("must be names alone, each once, of the classes 0, 1, ..., a line each")
        names = dict(enumerate(lines))
    lists = [files.folder]
    if not files.folder.is_file():
        shown = sorted(files.folder.glob("[!.]*"))
        lists = [path for path in shown if path.suffix.lower() in (".csv", ".tsv", ".txt")]
    for path in lists or [files.path("*.csv", "*.txt")]:  # none: says so
        files.where, words = str(path), sorted(split_words(path.stem))
        if len(words) > 1:
            raise UserError(f"its name says {' and '.join(words)}: which split is it?")
        if not words:
            print(f"{path}: train, since its name has none of: {', '.join(SPLIT_WORDS)}")
        for line in files.lines(path):
            name, label = path_and_label(line)
            label = re.sub(r"^(-?\d+)\.0*$", r"\1", label)  # 3.0
            video, split = Path(args.root, name), SPLIT_WORDS[words[0]] if words else "train"
            record = {"video": video if video.is_file() else None, "split": split}
            if label.isdigit():
                record |= {"class_id": int(label), "label": names[int(label)] if names else label}
            elif label != "-1":  # none
                record["label"] = label
            yield name, record


def index_folder(args, files, find):
    """ROOT/<label>/.../<video>; or, if all folders with videos in ROOT are named as splits,
    ROOT/<split>/<label>/.../<video> and ROOT/<split>/<video>. A video in ROOT itself: its name is
    the label."""
    paths = list(dataset.videos_under(args.root, files.others))
    folders_of = {path: path.relative_to(args.root).parts[:-1] for path in paths}
    has_splits = {names[0].lower() for names in folders_of.values() if names} <= SPLIT_WORDS.keys()
    for path, folders in folders_of.items():
        files.where, split, labels = str(path), "train", folders or [path.stem]
        if folders and has_splits:
            split, labels = SPLIT_WORDS[folders[0].lower()], folders[1:]
        label = {"label": labels[0]} if labels else {}
        yield path.name, {"video": path} | label | {"split": split}
    unused = {name for names in folders_of.values() for name in names if split_words(name)}
    if unused and not has_splits:
        some, words = ", ".join(sorted(unused)[:5]), ", ".join(SPLIT_WORDS)
        print(f"{args.root}: not taken as splits: {some}; not all folders in ROOT are: {words}")


DATASETS = {
    "folder": index_folder, "list": index_list, "k400": index_k400, "ssv2": index_ssv2,
    "ucf101": index_ucf101, "hmdb51": index_hmdb51, "diving48": index_diving48,
    "epic55": index_epic55,
}  # fmt: skip


def finder(root, others):
    """-> find(stem, *hints): the video under root with that name, whatever its folder and suffix;
    of several, the one whose folders have the most of the hints (label, split), then .mp4, then
    the largest."""

    def plain(text):
        return text.lower().replace(" ", "_")

    table = defaultdict(list)
    for path in dataset.videos_under(root, others):
        table[path.stem].append(path)

    def find(stem, *hints):
        def likeness(path):
            alike = set(map(plain, hints)) & set(map(plain, path.parts))
            size = path.stat().st_size if path.exists() else 0
            return len(alike), path.suffix == ".mp4", size

        return max(table.get(stem, ()), key=likeness, default=None)

    return find


def read_annotations(args):
    """-> [(where it says so, the video's name, record)]; what is wrong with a file is a UserError
    that names file and line."""
    files, rows = Annotations(args.annotations or args.root), []
    find = finder(args.root, files.others) if args.dataset not in ("folder", "list") else None
    try:
        for name, record in DATASETS[args.dataset](args, files, find):
            if record.get("human_captions") == [""]:
                raise UserError("an empty caption")
            rows.append((files.where, name, record))
    except KeyError as error:
        raise UserError(f"{files.where}: {error} is unknown or missing") from error
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{files.where}: {error}") from error
    others = [p for p in files.others if not (find and p.endswith((".csv", ".json", ".txt")))]
    if others:
        print(f"{len(others)} other files were left out, such as {others[0]}")
    if not any(record["video"] for *_, record in rows):
        missing = f", none of the {len(rows)} listed, such as {rows[0][1]}" if rows else ""
        raise UserError(f"{args.root}: no videos ({' '.join(sorted(dataset.VIDEOS))}){missing}")
    return rows


def relative(path, folder):
    """The path of a file as seen from a folder. If that leads nowhere, since the folder is a link
    to another place, folders are resolved; a file that is itself a link keeps its name."""
    written = os.path.relpath(path, folder)
    if os.path.isdir(folder) and not os.path.exists(os.path.join(folder, written)):
        away, name = os.path.split(os.path.abspath(path))
        path, folder = os.path.join(os.path.realpath(away), name), os.path.realpath(folder)
    return os.path.relpath(path, folder)


def write_text(path, text):
    with runs.naming(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    with runs.replacing(path, "w", encoding="utf-8", errors="surrogateescape") as file:  # not UTF-8
        file.write(text)


def write_manifest(path, records):
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def report(manifest, command, problems):
    """Lists the problems beside the manifest, and says so."""
    listed = manifest.with_name(f"{manifest.stem}.{command}-problems.txt")
    listed.unlink(missing_ok=True)
    if problems:
        write_text(listed, "".join(line + "\n" for line in problems))
        print(f"{len(problems)} problem(s), listed in {listed}:\n  " + "\n  ".join(problems[:5]))


def segments(record, seconds):
    """A clip of every so many seconds of a longer video; a last piece of less than half of that
    joins the one before, and so does one in which no frame begins."""
    with dataset.open_video(record["video"]) as video:
        dataset.probe_video(video)  # that a frame can be decoded
        times = video.index.seconds
    length = times[-1] + np.median(np.diff(times)) if len(times) > 1 else 0  # to the last one's end
    count = int(length / seconds + 0.5)
    begins = np.unique((times + 1e-6) // seconds).astype(int)  # pieces in which a frame begins
    cuts = [round(i * seconds, 3) for i in begins.tolist() if 0 < i < count]
    starts, ends = ([{"start": cut} for cut in cuts], [{"end": cut} for cut in cuts])
    return [record | start | end for start, end in zip([{}, *starts], [*ends, {}])]


def draw_test_split(args, rows):
    """Makes records test clips by a hash of their path below ROOT, so that more videos never move
    those that are there. UserError where the dataset has splits of its own."""
    records = [record for *_, record in rows if record["video"]]
    if args.dataset not in ("folder", "list") or any(r["split"] != "train" for r in records):
        raise UserError(f"--test-share {args.test_share}: {args.root} has splits of its own")
    for record in records:
        name = os.fsencode(os.path.relpath(record["video"], args.root))
        if int.from_bytes(hashlib.sha256(name).digest()[:8]) < args.test_share * 2**64:
            record["split"] = "test"


def index(args):
    if runs.rank_and_world()[0]:
        return
    if not args.root.is_dir():
        raise UserError(f"{args.root}: no such folder")
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out}: exists, perhaps with captions; --force writes it anew")
    rows = read_annotations(args)
    if args.test_share:
        draw_test_split(args, rows)
    found, problems, counts = [], [], defaultdict(Counter)
    for where, name, record in rows:
        video, state, reason, clips = record["video"], "found", None, [record]
        if video is None:
            state, reason = "missing", f"no video {name}"
        elif not os.path.isfile(video) or not os.path.getsize(video):
            state, reason = "unreadable", f"{video}: empty, or a link to nothing"
        elif args.segment and "start" not in record:
            try:
                clips = segments(record, args.segment)
            except VideoError as error:
                state, reason = "unreadable", str(error)
        if reason:
            problems.append(f"{state}\t{where}\t{reason}")
        else:
            path = relative(video, args.out.parent)
            found += [clip | {"video": path} for clip in clips]
        counts[record["split"]][state] += len(clips)
    for split, states in sorted(counts.items()):
        labels = {record.get("label") for record in found if record["split"] == split} - {None}
        said = ", ".join(f"{states[state]} {state}" for state in ("found", "missing", "unreadable"))
        print(f"{args.out}: {split}: {said}; {len(labels)} labels")
    if args.test_share:
        labels = {split: {r.get("label") for r in found if r["split"] == split} for split in counts}
        for split, other in (("test", "train"), ("train", "test")):
            if lacking := labels.get(other, set()) - labels.get(split, set()) - {None}:
                print(f"{args.out}: {split}: no clip of {', '.join(sorted(map(str, lacking)))}")
    report(args.out, "index", problems)
    if not found:
        raise UserError(f"{args.root}: none of {len(rows)} videos can be read")
    write_manifest(args.out, found)


# ==== Work: shared by processes, and surviving a kill =============================================
# A unit of work is a list of keys, each a clip; what became of a key is a line that was appended to
# MANIFEST.work/RANK.jsonl.


def keys_of(records):
    """A key for each record, that does not change when others are added or captioned."""
    seen, keys = Counter(), []
    for record in records:
        clip = json.dumps([record["video"], record.get("start"), record.get("end")])
        seen[clip] += 1
        keys.append(hashlib.sha256(f"{clip} {seen[clip]}".encode()).hexdigest()[:16])
    return keys


def work_of(manifest):
    return manifest.with_name(manifest.name + ".work")


def read_work(folder, settings):
    """{key: outcome} of what any process did, before and after a kill. What was done under other
    settings, a line of their own above it, is a UserError."""
    outcomes, then = {}, settings
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue  # blank, or cut short by a kill: that unit is done again
            if "key" not in found:
                then = found
            elif then == settings:
                outcomes[found.pop("key")] = found
            else:
                other = dict(then.items() - settings.items())
                raise UserError(
                    f"{folder}: unfinished work with {other}; finish it with its own flags, or "
                    "remove the folder"
                )
    return outcomes


def try_each(load, keys):
    """What load(key) returned for each key, or the VideoError that it raised."""
    values = []
    for key in keys:
        try:
            values.append(load(key))
        except VideoError as error:
            values.append(error)
    return values


def share(manifest, settings, units, load, compute, *, workers=0, unit="clip"):
    """Does the units of work that nobody has done yet, shared between torchrun's processes.

    `load` (key -> anything; VideoError: that key failed) runs in loader processes, ahead of
    `compute` (keys, what was loaded -> a dict for each, its outcome). -> {key: outcome} of all
    units; the outcome of a failure is {"error": ...}."""
    rank, world = runs.rank_and_world()
    folder = work_of(manifest)
    with runs.naming(folder):
        folder.mkdir(exist_ok=True)
    done = read_work(folder, settings).keys()
    runs.wait_for_all()  # all have read what was done before any adds to it
    # It begins a line: a kill may have cut the last one.
    runs.append(folder / f"{rank}.jsonl", f"\n{json.dumps(settings)}\n")
    todo = [keys for keys in units if not done >= set(keys)][rank::world]
    collate = functools.partial(try_each, load)
    loaded = runs.batches_of(todo, min(workers, len(todo)), batch_size=None, collate_fn=collate)
    name = settings["command"] + (f", one of {world} processes" if world > 1 else "")
    with runs.progress(total=sum(map(len, todo)), desc=name, unit=unit, disable=rank > 0) as bar:
        for keys, values in zip(todo, loaded):
            outcomes, good = {}, {}
            for key, value in zip(keys, values):
                if isinstance(value, VideoError):
                    outcomes[key] = {"error": str(value)}
                else:
                    good[key] = value
            if good:
                outcomes |= zip(good, compute(list(good), list(good.values())))
            lines = [json.dumps({"key": key} | outcomes[key]) for key in outcomes]
            runs.append(folder / f"{rank}.jsonl", "\n".join(lines) + "\n")
            bar.update(len(keys))
    runs.wait_for_all()  # all is done
    outcomes = read_work(folder, settings)
    runs.wait_for_all()  # all have read it before rank 0 removes it
    return {key: outcomes[key] for keys in units for key in keys}


def conclude(manifest, command, outcomes, update):
    """On rank 0: puts the outcomes into the manifest, by update(key, record, outcome), or marks as
    failed. The manifest is read again: hours may have passed, and others may have added to it.
    UserError if all failed."""
    if runs.rank_and_world()[0]:
        return
    read, failures, done = dataset.read_manifest(manifest), [], 0
    own = (json.loads(line) for line in read.data.split(b"\n") if line.strip())
    # `path` and `map_path`, which read_manifest adds, are those of the file.
    records = [{key: line[key] for key in record if key in line} for line, record in zip(own, read)]
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
    shutil.rmtree(work_of(manifest), ignore_errors=True)
    report(manifest, command, failures)
    left = len(records) - done - len(failures)
    print(f"{manifest}: {command}: {done} clips, {len(failures)} failed; {left} left as they were")
    if failures and not done:
        raise UserError(f"{manifest}: all {len(failures)} clips failed, the first: {failures[0]}")


# ==== caption: records -> records with captions ===================================================
PROMPTS = (  # the paper's Figure 5(a)
    "Describe the action {}.",
    "What does a person {} look like?",
    "What does the act of {} look like?",
)


def phrase(label):
    """A class name in words: 'ApplyEyeMakeup', 'apply_eye_makeup' -> 'apply eye makeup'; EPIC's
    'board:chopping' -> 'chopping board'. TV, iPhone and 10:30 stay."""
    # UCF101's YoYo is the only name of a class with a word of two letters.
    text = re.sub(r"(?<=[a-z]{2})(?=[A-Z])|(?<=Yo)(?=Yo)", " ", label).replace("_", " ")
    colon = r"(?<!\S)([^\W\d][^\s:]*):([^\W\d]\S*)"
    text = re.sub(colon, lambda match: f"{match[2].replace(':', ' ')} {match[1]}", text)
    return " ".join(w if re.search("^[A-Z][^a-z]+$|.[A-Z]", w) else w.lower() for w in text.split())


def sentence(label):
    text = phrase(label)
    first = text[:1] if text[1:2].isupper() else text[:1].upper()  # iPhone
    return first + text[1:] + "."


def caption_label(record):
    """The oracle of the paper's Figure 5(b): the class name as a sentence."""
    label = str(record.get("label") or "").strip()
    if not label:
        return {"error": "no label"}
    if label.isdigit():
        return {"error": f"label {label} is a number; index list --classes FILE names it"}
    return {"captions": [sentence(label)]}


def caption_human(record):
    """What the dataset itself says, which gives the class away. The paper uses none."""
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
    """A transformers class from a hub name or a local folder; UserError with the ways out."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(model, **more)
    except (OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = weights.first_line(error)
        raise UserError(
            f"--model {model}: {reason}. Way out: --model FOLDER, a downloaded one"
        ) from error


def captions_or_error(texts, who):
    captions = [" ".join(text.split()) for text in texts if text.strip()]
    return {"captions": captions} if captions else {"error": f"{who} wrote nothing"}


def load_model(kind, args):
    dtype = torch.bfloat16 if weights.bf16_is_fast(args.device) else torch.float32
    model, found = from_pretrained(kind, args.model, dtype=dtype, output_loading_info=True)
    if lacking := sorted(found["missing_keys"]):
        runs.say(
            f"note    --model {args.model}: lacks {len(lacking)} weights, which are random now: "
            f"{lacking[0]}, ..."
        )
    return model.eval().to(args.device)


class Blip2:
    """Keyframes -> a caption each (3.2), greedily, as transformers does (LAVIS: with 5 beams)."""

    def __init__(self, args):
        self.args, self.processor = args, from_pretrained("Blip2Processor", args.model)
        self.model = load_model("Blip2ForConditionalGeneration", args)

    @torch.no_grad()
    def __call__(self, keys, clips):
        images = [Image.fromarray(frame.numpy()) for clip in clips for frame in clip]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        pixels, config, more = pixels.to(self.args.device, self.model.dtype), self.model.config, {}
        if config.text_config.is_encoder_decoder:  # T5 has no token to start from: an empty prompt
            prompt = [config.image_token_index] * config.num_query_tokens
            prompt = torch.tensor([prompt + [config.text_config.eos_token_id]] * len(pixels))
            more["input_ids"] = prompt.to(self.args.device)
        length = self.args.max_new_tokens
        said = self.model.generate(pixel_values=pixels, max_new_tokens=length, **more)
        said = self.processor.batch_decode(said, skip_special_tokens=True)
        each = len(clips[0])
        texts = (said[i : i + each] for i in range(0, len(said), each))
        return [captions_or_error(texts_of_clip, "BLIP-2") for texts_of_clip in texts]


class Llm:
    """A class name -> what the model says of it: the paper's three prompts, several answers to
    each."""

    def __init__(self, args):
        self.args, self.tokenizer = args, from_pretrained("AutoTokenizer", args.model)
        self.model = load_model("AutoModelForCausalLM", args)

    @torch.no_grad()
    def answers(self, prompt):
        args, tokenizer = self.args, self.tokenizer
        if tokenizer.chat_template:
            tokens = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                enable_thinking=False,  # where a template knows it
            )
        else:
            tokens = tokenizer(prompt, return_tensors="pt")
        tokens = {name: tokens[name].to(args.device) for name in ("input_ids", "attention_mask")}
        # Seeded by what is asked: who asks, and what was asked before, makes no difference.
        digest = hashlib.sha256(f"{args.seed} {prompt}".encode()).hexdigest()
        torch.manual_seed(int(digest[:15], 16))
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        said = self.model.generate(
            **tokens,
            do_sample=True,
            num_return_sequences=args.per_prompt,
            max_new_tokens=args.max_new_tokens,
            pad_token_id=pad,
        )
        said = said[:, tokens["input_ids"].shape[1] :]  # what follows the prompt
        said = tokenizer.batch_decode(said, skip_special_tokens=True)
        asked = tokenizer.decode(tokens["input_ids"][0]).strip()
        if asked.endswith("<think>") or "think>" in "".join(said):
            raise UserError(f"--model {args.model}: thinks before it answers: another --model")
        return said

    def __call__(self, keys, labels):
        asked = ([prompt.format(phrase(label)) for prompt in PROMPTS] for label in labels)
        said = (sum(map(self.answers, prompts), []) for prompts in asked)
        return [captions_or_error(texts, "the LLM") for texts in said]


def caption(args):
    records = list(dataset.read_manifest(args.manifest))
    wanted = dict(zip(keys_of(records), records))
    if not (args.force or args.append):
        wanted = {key: record for key, record in wanted.items() if not record.get("captions")}
    args.model = args.model or MODELS.get(args.source)
    names = "command source model frames batch_size per_prompt max_new_tokens seed append force"
    settings, keys = {name: getattr(args, name) for name in names.split()}, list(wanted)
    if args.source == "blip2":
        # The batches do not depend on who computes them, nor on what was done before a kill.
        units = [keys[i : i + args.batch_size] for i in range(0, len(keys), args.batch_size)]
        load, compute = functools.partial(load_keyframes, wanted, args.frames), keys and Blip2(args)
        said = share(args.manifest, settings, units, load, compute, workers=args.workers)
    elif args.source == "llm":
        named = {key: caption_label(wanted[key]) for key in keys}
        labels = {key: str(wanted[key].get("label")) for key in keys}
        units = [[label] for label in sorted({labels[k] for k in keys if "captions" in named[k]})]
        told = share(args.manifest, settings, units, str, units and Llm(args), unit="class")
        said = {k: told[labels[k]] if "captions" in named[k] else named[k] for k in keys}
    else:  # a moment's work: one process does it all
        write = {"label": caption_label, "human": caption_human}[args.source]
        compute = lambda _, records: map(write, records)  # noqa: E731
        said = share(args.manifest, settings, [keys], wanted.get, compute)

    def update(key, record, outcome):
        before = record.get("captions", []) if args.append else []
        record["captions"] = before + [text for text in outcome["captions"] if text not in before]

    conclude(args.manifest, "caption", said, update)


# ==== maps ========================================================================================
# Records with captions -> the similarity of every patch of every `--every`th frame to every
# caption, so that training needs no CLIP.
PIECE = 32  # frames held at full size at a time


def path_of_map(manifest, key, video):
    """Two manifests in one folder have maps of their own."""
    digest = hashlib.sha256(f"{manifest.name} {key}".encode()).hexdigest()[:16]
    stem = Path(video).stem[:50]  # a file's name has 255 bytes at most
    return manifest.parent / "maps" / digest[:2] / f"{stem}-{digest[2:]}.npz"


def clip_id(args, clip):
    """Model, weights, and the first digits of the weights' SHA-256: two CLIPs of one name are told
    apart."""
    alike = weights.digest(clip.state_dict(), torch.bfloat16)  # whatever precision it runs in
    return f"{dataset.clip_name(args.clip, args.clip_pretrained)} {alike}"


def map_size(size, image_size, patch_size):
    """(H,W) of a frame -> (H',W'): the short side image_size, both rounded to whole patches."""
    return [max(1, round(side * image_size / min(size) / patch_size)) * patch_size for side in size]


def is_current(args, path, record, made_by, numbers, order):
    """Whether the wanted map is there. Half a map, or one of other captions or order of frames, is
    made anew; one of another CLIP, geometry or frames may be wanted by somebody: UserError."""
    try:
        saved = dataset.read_map(path, record["captions"], video=record["path"], order=order)
    except UserError:  # none at all, most often
        return False
    resized = map_size(saved.size, args.image_size, args.patch_size)
    for what, old, new in (
        ("CLIP", saved.clip, made_by), ("size", list(saved.resized), resized),
        ("patch size", saved.patch_size, args.patch_size),
        ("frames", saved.frames.tolist(), numbers),
    ):  # fmt: skip
        if old != new:
            raise UserError(
                f"{path}: {what} {str(old)[:60]}, now {str(new)[:60]}; --force makes all anew"
            )
    return True


def load_frames(args, made_by, clips, paths, key):
    """-> numbers, frames (F,3,H',W') uint8, size of the source, order of its frames; None if its
    map is there already."""
    record, images = clips[key], []
    with dataset.open_video(record["path"]) as video:
        first, stop = dataset.frame_range(video, record.get("start"), record.get("end"))
        numbers, order = list(range(first, stop, args.every)), video.index.order
        if not args.force and is_current(args, paths[key], record, made_by, numbers, order):
            return None
        decoded = (frame for _, frame, _ in dataset.each_frame(video, numbers))
        while piece := list(itertools.islice(decoded, PIECE)):
            frames = torch.from_numpy(np.stack(piece))  # (PIECE,H,W,3)
            size = tuple(frames.shape[1:3])
            resized = map_size(size, args.image_size, args.patch_size)
            images.append(TF.resize(frames.permute(0, 3, 1, 2), resized, antialias=True))
    return numbers, torch.cat(images), size, order


@torch.no_grad()
def similarity_map(clip, frames, text, patch_size, device):
    """frames (F,3,H',W') uint8, text (captions,E) -> (captions,F,h',w'), of one clip by itself."""
    chunk = 64 if device == "cpu" else 1024
    parts = []
    for piece in frames.split(PIECE):
        piece = piece.to(device).float() / 255
        patches = tgmae.patch_embeddings(clip, piece, patch_size, chunk=chunk)
        parts.append((patches @ text.T).cpu())  # (F,h',w',captions)
    return torch.cat(parts).permute(3, 0, 1, 2)


def make_map(args, clip, tokenizer, made_by, clips, paths, keys, loaded):
    """What load_frames says of clips -> their maps, written; nothing where they are there."""
    for key, value in zip(keys, loaded):
        if value is None:
            continue
        numbers, frames, size, order = value
        captions = clips[key]["captions"]
        text = tgmae.encode_text(clip, tokenizer, captions)
        similarity = similarity_map(clip, frames, text, args.patch_size, args.device)
        path = paths[key]
        with runs.naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with runs.replacing(path) as file:
            similarity, text = similarity.half().numpy(), text.half().cpu().numpy()
            geometry = {"source_size": size, "resized_size": frames.shape[-2:]}
            geometry |= {"frames": numbers, "patch_size": args.patch_size}
            about = {"captions": captions, "clip": made_by, "order": order}
            about["bytes"] = os.path.getsize(clips[key]["path"])
            np.savez(file, similarity=similarity, text=text, **geometry, **about)
    return [{} for _ in keys]


def maps(args):
    records = list(dataset.read_manifest(args.manifest))
    clips = {key: r for key, r in zip(keys_of(records), records) if r.get("captions")}
    if not clips:
        raise UserError(f"{args.manifest}: no clip has captions; captions.py caption makes them")
    paths = {key: path_of_map(args.manifest, key, clips[key]["video"]) for key in clips}
    clip = weights.load_clip(args.clip, args.clip_pretrained, args.device)
    made_by = clip_id(args, clip[0])
    runs.note_clip(
        args, clip[1], {text for record in clips.values() for text in record["captions"]}
    )
    names = "command every image_size patch_size force"
    settings = {name: getattr(args, name) for name in names.split()} | {"clip": made_by}
    load = functools.partial(load_frames, args, made_by, clips, paths)
    compute = functools.partial(make_map, args, *clip, made_by, clips, paths)
    units = [[key] for key in clips]
    made = share(args.manifest, settings, units, load, compute, workers=args.workers)

    def update(key, record, outcome):
        record["maps"] = os.path.relpath(paths[key], args.manifest.parent)

    conclude(args.manifest, "maps", made, update)


# ==== Command line ================================================================================
MODELS = {"blip2": "Salesforce/blip2-opt-2.7b", "llm": "Qwen/Qwen2.5-1.5B-Instruct"}


def parse_args(argv=None):
    about = "Manifest, captions and text maps for train.py."
    parser = runs.Parser(prog="captions.py", description=about)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help):
        adds = commands.add_parser(name, help=help, description=help)
        return functools.partial(runs.add_flag, adds)

    flag = command("index", "a dataset's videos and annotation files -> manifest")
    what = "whose annotation files to read; list: of `path label`; folder: none, folders are labels"
    flag("dataset", "folder", what, nargs="?", choices=DATASETS)
    flag("root", None, "the folder with the videos", type=Path)
    where = "folder of the annotation files (list: or a file); ROOT"
    flag("--annotations", None, where, type=Path)
    flag("--fold", 1, "which split of ucf101 and hmdb51", choices=(1, 2, 3))
    flag("--classes", None, "list: file with the names of labels 0, 1, ..., a line each", type=Path)
    pieces = "make a clip of every so many seconds of longer videos"
    flag("--segment", None, pieces, type=runs.positive)
    shares = "folder, list: share of the videos that become test clips; none"
    flag("--test-share", None, shares, type=runs.proper_fraction)
    flag("--out", Path("data.jsonl"), "the manifest to write", type=Path)
    flag("--force", False, "overwrite the manifest")

    flag = command("caption", "captions for the clips of a manifest that have none")
    flag("manifest", None, "JSON lines, as `index` writes them; rewritten at the end", type=Path)
    sources = "BLIP-2 on keyframes, the class name, an LLM that is told it, or human_captions"
    flag("--source", None, sources, required=True, choices=("blip2", "label", "llm", "human"))
    models = ", ".join(f"{source}: {model}" for source, model in MODELS.items())
    flag("--model", None, f"hub name or folder for transformers; {models}")
    flag("--frames", 3, "blip2: keyframes, a caption each; 1: the centre", type=runs.positive_int)
    flag("--batch-size", 8, "blip2: clips per forward", type=runs.positive_int)
    flag("--per-prompt", 3, "llm: answers to each of the three prompts", type=runs.positive_int)
    flag("--max-new-tokens", 60, "longest caption, in the model's tokens", type=runs.positive_int)
    flag("--seed", 0, "llm: of the sampling", type=runs.seed)
    flag("--append", False, "add to the captions that are there (the paper's BLIP + GPT)")
    flag("--force", False, "replace captions that are there")
    flag("--workers", None, runs.WORKERS, type=runs.natural)

    flag = command("maps", "text maps of clips with captions: CLIP once, instead of at every step")
    flag("manifest", None, "JSON lines; rewritten at the end, maps/ beside it", type=Path)
    flag("--clip", "ViT-B-32-quickgelu", "open_clip model, hf-hub:NAME or local-dir:FOLDER")
    flag("--clip-pretrained", "openai", "tag of open_clip, or a file of weights")
    flag("--every", 8, "frames from one mapped frame to the next", type=runs.positive_int)
    flag("--image-size", 224, "pixels of the short side, as the model's", type=runs.positive_int)
    flag("--patch-size", 16, "pixels, as the model's patch_size", type=runs.positive_int)
    flag("--force", False, "make maps anew that are there")
    flag("--workers", None, runs.WORKERS, type=runs.natural)

    parser.set_defaults(device="auto", amp=None)  # which start_processes settles
    args = parser.parse_args(argv)
    if args.command == "caption" and args.append and args.force:
        raise UserError("--append and --force exclude each other")
    if args.command == "maps" and args.image_size % args.patch_size:
        size = args.image_size
        raise UserError(f"--image-size {size} is not divisible by --patch-size {args.patch_size}")
    return args


def main(argv=None):
    with runs.one_line_errors("captions.py", "a smaller --batch-size, --model or --clip"):
        args = parse_args(argv)
        # On the CPU: what they tell each other is little, and the slowest may need days longer.
        runs.start_processes(args, "gloo", timedelta(days=30))
        {"index": index, "caption": caption, "maps": maps}[args.command](args)
        runs.wait_for_all()  # the manifest is written


if __name__ == "__main__":
    main()
