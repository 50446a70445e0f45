"""captions.py: annotation files, captions from tiny models of the real classes, maps, and kills."""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import ROOT, needs_transformers
from test_ranks import torchrun

import captions
import dataset
import runs
import tgmae
import toy
import train
import weights

KILLS = int(os.environ.get("KILLS", 5))  # of each command; more of them when asked


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(line, *more):
    """run("caption some.jsonl --source blip2 --model", folder)"""
    captions.main([*line.split(), *map(str, more)])


def fails(line, *more):
    """Runs with a mistake in it -> the one line that it says."""
    with pytest.raises(SystemExit) as stop:
        run(line, *more)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, stop.value.code
    return stop.value.code


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """A small video, each frame of which shows its own number as 8 black or white bars."""
    path = tmp_path_factory.mktemp("video") / "numbered.mp4"
    bits = np.arange(50)[:, None] >> np.arange(8) & 1  # (T,8)
    bars = (255 * bits.repeat(8, axis=1)).astype(np.uint8)[:, None, :, None]
    toy.write_video(path, np.broadcast_to(bars, (50, 64, 64, 3)))
    return path


def number_of(frame):
    bars = frame.float().mean((0, 2)).view(8, 8).mean(1) > 128
    return sum(int(bar) << bit for bit, bar in enumerate(bars))


@pytest.fixture
def tree(tmp_path, clip_file):
    """tree({"a/b.mp4": None, "list.txt": "text"}) -> data/, with a video, text or JSON a path."""

    def make(files):
        for name, content in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                os.link(clip_file, path)
            else:
                text = content if isinstance(content, str) else json.dumps(content)
                path.write_text(text, encoding="latin-1")
        return tmp_path / "data"

    return make


# ------------------------------------------------------------------------------------- index

KINETICS = "label,youtube_id,time_start,time_end,split"
SSV2_LABELS = {"Holding something next to something": "41", "Pushing something": "7"}
SSV2_ROWS = [
    {"id": "78687", "label": "holding potato next to vicks vaporub bottle",
     "template": "Holding [something] next to [something]", "placeholders": ["potato"]},
    {"id": "9", "label": "pushing a cup", "template": "Pushing [something]",
     "placeholders": ["a cup"]},
]  # fmt: skip
UCF101 = {
    "lists/classInd.txt": "1 ApplyEyeMakeup\n2 YoYo\n",
    "lists/trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\n",
    "lists/testlist01.txt": "YoYo/v_YoYo_g01_c01.avi\n",
    "lists/trainlist02.txt": "YoYo/v_YoYo_g01_c01.avi 1\n", "lists/testlist02.txt": "",
}  # fmt: skip
CLAP = "#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi"
HMDB51 = {
    "splits/clap_test_split1.txt": f"{CLAP} 1\na;b&(c) d.avi 2\nleft_out.avi 0\n",
    "splits/clap_test_split2.txt": f"{CLAP} 2 \n",
    "splits/._clap_test_split1.txt": "of macOS", "clap/left_out.avi": None, f"wave/{CLAP}": None,
}  # fmt: skip
DIVE = {"start_frame": 0, "end_frame": 150}
DIVES = [["Back", "15som", "05Twis", "FREE"], ["Forward", "Dive", "NoTwis", "PIKE"]]
EPIC = (
    "uid,participant_id,video_id,narration,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)
EPIC_NOUN = """take,0,board,1,"['board:chopping', 'tap']","[1, 0]"\n"""


def ssv2(prefix):
    files = {"train": SSV2_ROWS[:1], "validation": SSV2_ROWS[1:], "test": [{"id": "3"}]}
    files["labels"] = SSV2_LABELS
    named = {f"{prefix}{name}.json": content for name, content in files.items()}
    return named | {"9.webm": None}  # of two, mp4/9.mp4 has motion vectors


SSV2_FOUND = {
    "78687.webm": {
        "split": "train", "label": "Holding something next to something", "class_id": 41,
        "human_captions": ["holding potato next to vicks vaporub bottle"],
    },
    "mp4/9.mp4": {
        "split": "val", "label": "Pushing something", "class_id": 7,
        "human_captions": ["pushing a cup"],
    },
    "3.webm": {"split": "test"},
}  # fmt: skip

# Flags, files, {video: the rest of its record}, the list of what is missing, all of it of train.
INDEXED = {
    "k400": ("k400 data", {
        "train.csv": KINETICS + ",is_cc\nplaying chess,-abc_1,5,15,train,0\n"
                     '"cooking, outdoors",x y,0,10,train,0\nabseiling,gone,1,11,train,0\n',
        "val.csv": KINETICS + "\nabseiling,def,20,30,validate\n",
        "test.csv": "youtube_id,time_start,time_end,split\nghi,7,17,test\n",
    }, {
        "videos/playing_chess/-abc_1_000005_000015.mp4":
            {"split": "train", "label": "playing chess"},
        "videos/x y_000000_000010.mp4": {"split": "train", "label": "cooking, outdoors"},
        "videos/val/abseiling/def.mkv": {"split": "val", "label": "abseiling"},
        "videos/test/ghi_000007_000017.mp4": {"split": "test"},
    }, "missing\tdata/train.csv:4\tno video gone_000001_000011\n"),
    "ssv2": ("ssv2 data", ssv2("something-something-v2-"), SSV2_FOUND, ""),
    "ssv2, newer": ("ssv2 data", ssv2(""), SSV2_FOUND, ""),
    "ucf101": ("ucf101 data --annotations data/lists", UCF101, {
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi":
            {"label": "ApplyEyeMakeup", "class_id": 0, "split": "train"},
        "v_YoYo_g01_c01.mp4": {"label": "YoYo", "class_id": 1, "split": "test"},
    }, ""),
    "hmdb51": ("hmdb51 data --annotations data/splits", HMDB51, {
        f"clap/{CLAP}": {"label": "clap", "split": "train"},
        "clap/a;b&(c) d.avi": {"label": "clap", "split": "test"},
    }, ""),
    "hmdb51, fold 2": ("hmdb51 data --annotations data/splits --fold 2", HMDB51, {
        f"clap/{CLAP}": {"label": "clap", "split": "test"},
    }, ""),
    "diving48": ("diving48 data", {
        "Diving48_vocab.json": DIVES,
        "Diving48_V2_train.json": [{"vid_name": "a_00000", "label": 1} | DIVE],
        "Diving48_V2_test.json": [{"vid_name": "b_00001", "label": 0} | DIVE],
    }, {
        "rgb/a_00000.mp4": {"label": "Forward Dive NoTwis PIKE", "class_id": 1, "split": "train"},
        "rgb/b_00001.mp4": {"label": "Back 15som 05Twis FREE", "class_id": 0, "split": "test"},
    }, ""),
    "epic55": ("epic55 data", {
        "EPIC_train_action_labels.csv": EPIC
            + "0,P01,P01_01,take the board,00:00:00.50,00:00:02.04,30,122," + EPIC_NOUN
            + "9,P26,P26_03,take it,01:01:01.25,01:01:02.00,1,2," + EPIC_NOUN,
        "EPIC_verb_classes.csv": "verb_id,class_key,verbs\n0,take,\"['take', 'grab']\"\n",
        "EPIC_noun_classes.csv": "noun_id,class_key,nouns\n0,tap,['tap']\n"
                                 "1,board:chopping,['board']\n",
    }, {
        "P01/P01_01.MP4": {"label": "take board:chopping", "split": "train", "start": 0.5,
                           "end": 2.04, "human_captions": ["take the board"]},
        "P26/P26_03.MP4": {"label": "take board:chopping", "split": "val", "start": 3661.25,
                           "end": 3662.0, "human_captions": ["take it"]},
    }, ""),
    "list, a folder": ("list data --classes data/names.names", {
        "train.csv": "a b/c, d.mp4 1\nplain.mp4 0\n",
        "k400_val_list_videos.txt": "val/x.mp4\triding a bike\n",
        "names.names": "abseiling\nair drumming\n",
    }, {
        "val/x.mp4": {"label": "riding a bike", "split": "val"},
        "a b/c, d.mp4": {"label": "air drumming", "class_id": 1, "split": "train"},
        "plain.mp4": {"label": "abseiling", "class_id": 0, "split": "train"},
    }, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXED)
def test_index(name, tree, capsys):
    """What the annotation files say of each video, which videos are missing, and how many."""
    flags, files, found, missing = INDEXED[name]
    tree(files | dict.fromkeys(found))
    run(f"index {flags}")
    made = records("data.jsonl")
    assert made == [{"video": f"data/{video}"} | rest for video, rest in found.items()]
    problems = Path("data.index-problems.txt")
    assert (problems.read_text() if problems.exists() else "") == missing
    said = capsys.readouterr().out
    for split, count in Counter(record["split"] for record in made).items():
        gone = len(missing.splitlines()) if split == "train" else 0
        labels = len({r["label"] for r in made if r["split"] == split and "label" in r})
        counts = f"{split}: {count} found, {gone} missing, 0 unreadable; {labels} labels"
        assert counts in said


def test_list_of_absolute_paths(tree):
    root = tree({"plain.mp4": None})
    tree({"some.txt": f"{root}/plain.mp4,7\nno_suffix 3\n"})
    run("index list data --annotations data/some.txt")
    (record,) = records("data.jsonl")
    assert record == {"video": "data/plain.mp4", "label": "7", "class_id": 7, "split": "train"}
    problems = Path("data.index-problems.txt").read_text()
    assert problems == "missing\tdata/some.txt:2\tno video no_suffix\n"
    assert "label 7 is a number" in fails("caption data.jsonl --source label")


def test_folder(tree, capsys):
    files = {"train/wave/a.mp4": None, "val/wave/b.mp4": None, "c.mp4": None}
    root = tree(files | {"train/jump/bad.mp4": "no video", "train/jump/empty.mp4": ""})
    (root / "train/jump/gone.mp4").symlink_to("nowhere.mp4")
    run("index data")
    found = [
        {"video": "data/c.mp4", "label": "c", "split": "train"},
        # An empty file, or a link to none, needs no decoding; what is broken inside does.
        {"video": "data/train/jump/bad.mp4", "label": "jump", "split": "train"},
        {"video": "data/train/wave/a.mp4", "label": "wave", "split": "train"},
        {"video": "data/val/wave/b.mp4", "label": "wave", "split": "val"},
    ]
    assert records("data.jsonl") == found
    assert "train: 3 found, 0 missing, 2 unreadable; 3 labels" in capsys.readouterr().out
    assert "empty.mp4: empty, or a link" in Path("data.index-problems.txt").read_text()
    assert "data.jsonl: exists" in fails("index data")
    (root / "train/jump/bad.mp4").unlink()
    run("index data --force")
    assert records("data.jsonl") == [found[0], *found[2:]]


def test_share_of_test_videos(tree, capsys):
    """By the path below ROOT: more videos move none, wherever ROOT is, and all pieces of a video
    are on one side."""
    names = [f"{label}/{i}.mp4" for label in ("wave", "jump") for i in range(30)]
    tree(dict.fromkeys(names[:40]))

    def sides(manifest, root="data"):
        found = {}
        for record in dataset.read_manifest(manifest):
            below = os.path.relpath(record["path"], root)
            found.setdefault(below, set()).add(record["split"])
        return found

    run("index data --test-share 0.3 --segment 0.5")
    few = sides("data.jsonl")
    assert 4 <= sum(side == {"test"} for side in few.values()) <= 20
    assert all(len(side) == 1 for side in few.values())
    tree(dict.fromkeys(names[40:]))
    os.rename("data", "moved")
    run("index moved --test-share 0.3 --out more.jsonl")
    assert few.items() <= sides("more.jsonl", "moved").items()
    run("index moved --test-share 0.9999 --out all.jsonl")
    assert "all.jsonl: train: no clip of jump, wave" in capsys.readouterr().out
    Path("moved/list.txt").write_text("".join(f"{name} {name[:4]}\n" for name in names))
    run("index list moved --test-share 0.3 --out list.jsonl")
    assert sides("list.jsonl", "moved") == sides("more.jsonl", "moved")
    for split in ("train", "test"):
        Path(f"moved/{split}.txt").write_text(f"{names[0]} wave\n")
    os.remove("moved/list.txt")
    said = fails("index list moved --test-share 0.3 --out own.jsonl")
    assert said == "captions.py: --test-share 0.3: moved has splits of its own"


def test_a_folder_without_a_readable_video(tree):
    tree({"bad.mp4": "", "worse.mp4": ""})
    assert "data: none of 2 videos can be read" in fails("index data")
    assert "nowhere: no such folder" in fails("index nowhere")
    assert not Path("data.jsonl").exists()


def test_segments(world):
    """95 seconds in tens: ten clips, which are captioned, mapped and trained on; 14 are one."""
    noise = np.random.default_rng(0).integers(256, size=(95 * 4, 32, 48, 3), dtype=np.uint8)
    Path("v/waving").mkdir(parents=True)
    toy.write_video("v/waving/long.mp4", noise, fps=4)
    toy.write_video("v/waving/short.mp4", noise[: 14 * 4], fps=4)
    run("index v --segment 10")
    found, cuts = records("data.jsonl"), [None, *range(10, 100, 10), None]
    spans = [(record.get("start"), record.get("end")) for record in found]
    assert spans == [*itertools.pairwise(cuts), (None, None)]
    run("caption data.jsonl --source label")
    run(*map_command(world, "data.jsonl", every=8))
    for record, first in zip(dataset.read_manifest("data.jsonl"), range(0, 400, 40)):
        assert record["captions"] == ["Waving."]
        frames = dataset.read_map(record["map_path"], record["captions"]).frames
        stop = 380 if first == 360 else first + 40
        assert frames.tolist() == list(range(first, stop, 8))
    flags = "--data data.jsonl --preset toy --mask tgm --epochs 1 --warmup-epochs 0 --workers 0"
    train.main(f"{flags} --batch-size 5 --no-amp --out run".split())
    assert len(records("run/log.jsonl")) == 2
    Path("v/bad.mp4").write_bytes(b"x")
    run("index v --segment 10 --force")
    assert "unreadable" in Path("data.index-problems.txt").read_text()
    assert "--segment 0: must be positive" in fails("index v --segment 0")


MISTAKES = (
    ("k400", {}, "there is no train.csv or validate.csv or val.csv or test.csv"),
    ("k400", {"train.csv": "label,youtube_id\na,b\n"}, "train.csv:2: 'split' is unknown"),
    ("k400", {"train.csv": KINETICS + "\na,b,1,2\n"}, "train.csv:2: not the header's 5 fields"),
    ("k400", {"train.csv": KINETICS + '\n"a' + 200_000 * "x"}, "train.csv: field larger than"),
    ("k400", {"train.csv": KINETICS + "\na,b,one,2,train\n"},
     "train.csv:2: invalid literal for int() with base 10: 'one'"),
    ("k400", {"train.csv": KINETICS + "\na,b,1,2,dev\n"}, "train.csv:2: 'dev' is unknown"),
    ("k400", {"train.csv": KINETICS + "\na,b,1,2,train\n"},
     "none of the 1 listed, such as b_000001"),
    ("ssv2", {"train.json": "{", "labels.json": {}}, "train.json: Expecting property name"),
    ("ssv2", {"labels.json": ""}, "labels.json: Expecting value"),
    ("ssv2", {"labels.json": "\xff"}, "labels.json: 'utf-8' codec can't decode byte 0xff"),
    ("ssv2", {"train.json": ["x"], "labels.json": {}}, "train.json: entry 1: string indices"),
    ("ssv2", {"train.json": [{}], "labels.json": {}}, "train.json: entry 1: 'id' is unknown"),
    ("ssv2", {"train.json": [{"id": 1, "template": "X [y]", "label": "x"}], "labels.json": {}},
     "entry 1: 'X y' is unknown or missing"),
    ("ssv2", {"train.json": [{"id": 1, "template": "X", "label": " "}], "labels.json": {"X": 0}},
     "entry 1: an empty caption"),
    ("--fold 2 --annotations data/lists ucf101", UCF101,
     "trainlist02.txt:1: class 1, but classInd.txt says that YoYo is 2"),
    ("hmdb51", {}, "there is no *_test_split1.txt"),
    ("hmdb51", {"a_test_split1.txt": "a.avi 3\n"}, "a_test_split1.txt:1: '3' is unknown"),
    ("diving48", {"Diving48_vocab.json": DIVES, "Diving48_V2_train.json": [],
                  "Diving48_V2_test.json": [{"vid_name": "b", "label": 2}]},
     "Diving48_V2_test.json: entry 1: 2 is unknown or missing"),
    ("list", {}, "there is no *.csv or *.txt"),
    ("list", {"train.txt": "word\n"}, "train.txt:1: not `path label`"),
    *(("--classes data/a.names list", {"train.txt": "a.mp4 1\n", "a.names": names},
       "data/a.names: must be names alone") for names in ("1 a\n2 b\n", "a\n\nb\n", "a\nb\na\n")),
)  # fmt: skip


@pytest.mark.parametrize("flags, files, reason", MISTAKES)
def test_annotation_mistakes_name_file_and_line(flags, files, reason, tree):
    tree(files | {"video.mp4": None})
    assert reason in fails(f"index {flags} data")
    assert not Path("data.jsonl").exists()


def test_names_that_are_no_utf8(tree):
    # Latin-1, and a Unicode line separator.
    name = os.fsencode(tree({"a.mp4": None})) + b"/caf\xe9 \xe2\x80\xa8x.mp4"
    try:
        os.rename("data/a.mp4", name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    run("index data")
    run("caption data.jsonl --source label")
    (record,) = dataset.read_manifest("data.jsonl")
    assert os.path.samefile(record["path"], name)
    assert dataset.probe_video(record["path"]).frames == 50


# ------------------------------------------------------------------------------------- caption

WORDS = [f"word{i}" for i in range(60)]
WIDE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
TOKENS = dict(bos_token_id=1, eos_token_id=1, pad_token_id=0)
OPT = dict(WIDE, **TOKENS, model_type="opt", ffn_dim=32, word_embed_proj_dim=16)
T5 = dict(TOKENS, model_type="t5", d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
T5["decoder_start_token_id"] = 0


def tiny_tokenizer(folder):
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "<image>", *WORDS))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    start = {"single": "</s> $A", "special_tokens": [("</s>", 1)]}
    words.post_processor = tokenizers.processors.TemplateProcessing(**start)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "</s>", "unk_token": "<unk>"}
    names["additional_special_tokens"] = ["<image>"]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    fast.save_pretrained(folder)
    return fast, len(vocabulary)


def tiny_blip2(folder, text_config):
    """Blip2ForConditionalGeneration of a few thousand parameters, and its processor."""
    tokenizer, size = tiny_tokenizer(folder)
    parts = {
        "vision_config": dict(WIDE, image_size=28, patch_size=7),
        "qformer_config": dict(WIDE, encoder_hidden_size=16, vocab_size=size),
        "text_config": dict(text_config, vocab_size=size),
    }
    config = transformers.Blip2Config(**parts, num_query_tokens=4, image_token_index=3)
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config)
    for p in model.parameters():
        p.data.normal_(std=0.7)  # so that different frames get different captions
    model.save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 28, "width": 28})
    transformers.Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    return tiny_blip2(tmp_path_factory.mktemp("blip2"), OPT)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A Llama of a few thousand parameters with its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("llm")
    _, size = tiny_tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=size, **WIDE, **TOKENS)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def bare(manifest):
    """bare(5) -> some.jsonl: five toy clips without captions, and the extra lines."""

    def make(clips, extra=()):
        path = manifest(clips)
        named = [{"video": r["video"], "label": r["label"]} for r in records(path)]
        captions.write_manifest(path, [*named, *extra])
        return path

    return make


def test_keyframes(clip_file):
    """(2i+1)n/(2k), of the whole and of a segment, read from the numbers that the frames show."""
    second = {"start": 1.0, "end": 2.0}  # 12 frames a second
    for segment, count, wanted in (({}, 3, [8, 25, 41]), ({}, 1, [25]), (second, 3, [14, 18, 22])):
        clips = {"key": {"path": str(clip_file)} | segment}
        frames = captions.load_keyframes(clips, count, "key")
        assert [number_of(frame) for frame in frames] == wanted


@needs_transformers
@pytest.mark.parametrize("language_model", [OPT, T5], ids=["opt", "t5"])
def test_blip2(language_model, bare, tmp_path, capsys, monkeypatch):
    """Each frame gets what the model says of it alone, whatever the batch; what cannot be read goes
    without."""
    monkeypatch.setattr(weights, "bf16_is_fast", lambda device: False)
    folder = tiny_blip2(tmp_path / "blip2", language_model)
    data = bare(4, [{"video": "seen.mp4", "captions": ["mine"]}, {"video": "gone.mp4"}])
    flags = "caption some.jsonl --source blip2 --batch-size 2 --workers 2 --model", folder
    run(*flags)
    *good, seen, gone = dataset.read_manifest(data)
    assert seen["captions"] == ["mine"] and "captions" not in gone
    assert "gone.mp4: No such file" in gone["failed"]
    assert "caption: 4 clips, 1 failed; 1 left as they were" in capsys.readouterr().out
    assert "gone.mp4" in Path("some.caption-problems.txt").read_text()

    processor = transformers.Blip2Processor.from_pretrained(folder)
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder)
    for record in good:
        frames = dataset.read_clip(record["path"], [4, 12, 20])
        for text, frame in zip(record["captions"], frames.permute(0, 3, 1, 2), strict=True):
            asked = processor(images=frame, text="", return_tensors="pt")
            tokens = model.generate(**asked, max_new_tokens=60)[0]
            assert text == processor.decode(tokens, skip_special_tokens=True).strip()
            assert text.startswith("word")
    assert len({text for record in good for text in record["captions"]}) > 1

    run(*flags, "--frames", 1, "--force")  # the centre frame
    again = [record.get("captions") for record in records(data)[:4]]
    assert again == [record["captions"][1:2] for record in good]


@needs_transformers
def test_llm(bare, llm, monkeypatch):
    answers = mock.create_autospec(captions.Llm.answers, side_effect=captions.Llm.answers)
    monkeypatch.setattr(captions.Llm, "answers", answers)
    data = bare(20)
    flags = "caption some.jsonl --source llm --per-prompt 2 --max-new-tokens 5 --model", llm
    run(*flags)
    first, asked = records(data), [call.args[1] for call in answers.call_args_list]
    assert len(asked) == 3 * 16 and asked[:3] == [  # once a class
        "Describe the action circle down.",
        "What does a person circle down look like?",
        "What does the act of circle down look like?",
    ]
    assert first[0]["captions"] == first[16]["captions"] and len(first[0]["captions"]) == 6
    assert all(set(text.split()) <= {*WORDS, "<unk>"} for r in first for text in r["captions"])
    run(*flags, "--force")
    assert records(data) == first  # the seed decides, not the order of what was asked before
    run(*flags, "--force", "--seed", 1)
    assert records(data)[0]["captions"] != first[0]["captions"]


@needs_transformers
def test_chat_template_is_used(llm, monkeypatch):
    args = captions.parse_args(["caption", "x", "--source", "llm", "--model", str(llm)])
    args.device = "cpu"
    teller = captions.Llm(args)
    template = "{% for m in messages %}word1 {{ m.content }} word2{% endfor %}"
    teller.tokenizer.chat_template = template
    teller.model.generate = mock.Mock(wraps=teller.model.generate)
    teller.answers("word7")
    (seen,) = teller.model.generate.call_args.kwargs["input_ids"]
    assert teller.tokenizer.decode(seen, skip_special_tokens=True) == "word1 word7 word2"
    teller.tokenizer.chat_template = "{{ 'word1' if enable_thinking is false else 'word2' }}"
    teller.answers("word7")
    (seen,) = teller.model.generate.call_args.kwargs["input_ids"]
    assert teller.tokenizer.decode(seen, skip_special_tokens=True) == "word1"
    for asked, said in (("word1", "<think> word2"), ("word1", "</think>"), ("a <think>", "word2")):
        monkeypatch.setattr(teller.tokenizer, "decode", lambda *_, text=asked, **__: text)
        monkeypatch.setattr(teller.tokenizer, "batch_decode", lambda *_, text=said, **__: [text])
        with pytest.raises(ValueError, match="thinks before it answers"):
            teller.answers("word7")


@needs_transformers
def test_a_model_that_lacks_weights(bare, blip2, tmp_path, capsys):
    folder = shutil.copytree(blip2, tmp_path / "part")
    whole = safetensors.torch.load_file(folder / "model.safetensors")
    part = {name: value for name, value in whole.items() if "qformer" not in name}
    safetensors.torch.save_file(part, folder / "model.safetensors", {"format": "pt"})
    bare(1)
    run("caption some.jsonl --source blip2 --model", folder)
    lacking = f"lacks {len(whole) - len(part)} weights, which are random now: qformer."
    assert lacking in capsys.readouterr().out


def test_append_and_human(manifest):
    data = manifest(2)
    lines = records(data)
    said_and_more = {"human_captions": ["as said"], "other": [1]}
    captions.write_manifest(data, [lines[0] | said_and_more, lines[1]])
    run("caption some.jsonl --source human --append")
    one, two = records(data)
    assert one["captions"] == lines[0]["captions"] + ["as said"] and one["other"] == [1]
    assert "no human_captions" in two["failed"] and two["captions"] == lines[1]["captions"]
    run("caption some.jsonl --source label --append")
    run("caption some.jsonl --source label --append")  # twice the same adds nothing
    assert records(data)[0]["captions"] == one["captions"] + ["Circle left."]
    run("caption some.jsonl --source label")
    assert len(records(data)[0]["captions"]) == 5  # without --force nothing is replaced
    run("caption some.jsonl --source label --force")
    assert records(data)[0]["captions"] == ["Circle left."]


def test_keys_that_read_manifest_adds():
    """Somebody's own `path` and `map_path` outlive a rewritten manifest; where there are none, none
    are written."""
    own = {"path": "/mine", "map_path": 3, "other": {"a": [1]}}
    clips = [{"video": "a.mp4", "label": "wave"} | own, {"video": "b.mp4", "maps": "b.npz"}]
    captions.write_manifest("some.jsonl", clips)
    run("caption some.jsonl --source label")
    made = {"captions": ["Wave."]}, {"failed": "no label"}
    assert records("some.jsonl") == [clip | more for clip, more in zip(clips, made)]


def test_sentences():
    for label, text in (
        ("ApplyEyeMakeup", "Apply eye makeup."), ("apply_eye_makeup", "Apply eye makeup."),
        ("YoYo", "Yo yo."), ("take board:chopping", "Take chopping board."),
        ("turn-on tap", "Turn-on tap."), ("playing TV games", "Playing TV games."),
        ("unboxing iPhone", "Unboxing iPhone."), ("eBay sale", "eBay sale."), ("GoPro", "GoPro."),
        ("at 10:30", "At 10:30."), ("16:9 or 2:x", "16:9 or 2:x."), ("in T2", "In T2."),
    ):  # fmt: skip
        assert captions.sentence(label) == text


# ------------------------------------------------------------------------------------- maps


def map_command(world, manifest="some.jsonl", every=4):
    flags = f"--image-size 64 --patch-size 8 --every {every} --clip"
    return f"maps {manifest} {flags}", f"local-dir:{world / 'clip'}"


def test_map_equals_online_scores(world, manifest, monkeypatch):
    """For crops that fall on whole patches a map holds what text_scores computes on the crop."""
    monkeypatch.setattr(weights, "bf16_is_fast", lambda device: False)
    data = manifest(3)
    run(*map_command(world))
    clip = tgmae.load_clip(f"local-dir:{world / 'clip'}")
    close = {"atol": 1e-3, "rtol": 0}
    for record in dataset.read_manifest(data):
        found = dataset.read_map(record["map_path"], record["captions"])
        assert found.similarity.shape == (3, 6, 8, 8) and found.similarity.dtype == torch.float16
        assert found.frames.tolist() == [0, 4, 8, 12, 16, 20] and found.text.shape == (3, 64)
        assert found.size == found.resized == (64, 64) and found.patch_size == 8
        frames = dataset.read_clip(record["path"], found.frames.tolist())
        for caption, similarity, saved in zip(record["captions"], found.similarity, found.text):
            text = tgmae.encode_text(*clip, [caption])
            torch.testing.assert_close(saved.float(), text[0], **close)
            for corner_and_size in ((0, 0, 64, 64), (16, 24, 32, 32), (8, 0, 40, 40)):
                crop = dataset.Crop(*corner_and_size)
                video = tgmae.normalize(dataset.crop_frames(frames, crop, crop.height)[None])
                online = tgmae.text_scores(clip[0], video, text, 8, 1)[0]
                cropped = dataset.crop_map(similarity, crop, found.size, online.shape)
                torch.testing.assert_close(cropped, online, **close)
    with np.load(record["map_path"], allow_pickle=False) as file:
        assert file["captions"].tolist() == record["captions"]
        assert all(file[name].dtype != object for name in file.files)


def test_maps_or_clip(world, manifest, capsys):
    """--no-maps asks CLIP about clips that have text maps; a run does not change that."""
    data, (command, clip) = manifest(4), map_command(world)
    flags = f"--data {data} --recipe few --mask tgm --epochs 2 --workers 0 --out run"
    run(command, clip)
    train.main([*flags.split(), "--no-maps", "--clip", clip])
    assert "CLIP online (" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="use_maps False -> True"):
        train.main([*flags.split(), "--maps"])
    train.main([*flags.split(), "--no-resume"])
    assert "text maps (local-dir:clip " in capsys.readouterr().out


def test_crop_map_between_cells():
    """Bilinear at the centre of each patch of the crop, mirrored: NumPy's, along one axis after the
    other."""
    similarity = torch.randn(2, 5, 7).double()
    crop, size, grid = dataset.Crop(13, 31, 90, 60, flip=True), (100, 140), (2, 3, 4)
    cropped = dataset.crop_map(similarity, crop, size, grid)
    rows = (13 + (np.arange(3) + 0.5) * 90 / 3) / 100 * 5 - 0.5
    columns = (31 + (np.arange(4) + 0.5) * 60 / 4) / 140 * 7 - 0.5
    for cells, found in zip(similarity.numpy(), cropped.numpy(), strict=True):
        between = [np.interp(rows, np.arange(5), column) for column in cells.T]  # (7,3)
        expected = [np.interp(columns, np.arange(7), row) for row in np.transpose(between)]
        np.testing.assert_allclose(found[:, ::-1], expected, atol=1e-5)


@pytest.mark.slow
def test_masks_from_maps_cover_what_online_masks_cover(full_world):
    """Random crops, flips and times of the 200 test clips: within two points of online masks, at
    both ratios."""
    made = dataset.read_manifest(full_world / "manifest.jsonl", "test")
    lines = [{"video": r["path"], "captions": r["captions"]} for r in made]
    captions.write_manifest("test.jsonl", lines)
    run(*map_command(full_world, "test.jsonl"))
    config, truth = tgmae.PRESETS["toy"], toy.read_truth(full_world)
    generator = torch.Generator().manual_seed(0)
    videos, texts, from_map, areas = [], [], [], []
    for i, (record, original) in enumerate(zip(dataset.read_manifest("test.jsonl"), made)):
        numbers = dataset.clip_indices(0, toy.FRAMES, config.num_frames, 4, generator=generator)
        crop = dataset.multi_scale_crop((toy.SIZE, toy.SIZE), generator=generator)
        frames = dataset.read_clip(record["path"], numbers)
        videos.append(dataset.crop_frames(frames, crop, config.image_size))
        found = dataset.read_map(record["map_path"], record["captions"])
        texts.append(found.text[i % 3])
        scores = dataset.map_scores(found, i % 3, numbers[::2], crop, found.size, config.grid)
        from_map.append(scores)
        actor = torch.from_numpy(truth[original["video"]][0, numbers].astype(np.uint8) * 255)
        actor = actor[..., None].expand(-1, -1, -1, 3)
        areas.append(dataset.crop_frames(actor, crop, config.image_size))
    clip = tgmae.load_clip(f"local-dir:{full_world / 'clip'}")[0]
    online = tgmae.text_scores(clip, tgmae.normalize(torch.stack(videos)), torch.stack(texts), 8, 2)
    area = tgmae.patchify(torch.stack(areas).float(), 8, 2).mean(-1)  # (B,N)
    for ratio in (0.25, 0.6):
        masks = [tgmae.topk_mask(scores, ratio) for scores in (online, torch.stack(from_map))]
        was, now = (((mask * area).sum() / area.sum()).item() for mask in masks)
        agree = (masks[0] == masks[1]).float().mean().item()
        print(f"ratio {ratio}: actor covered online {was:.1%}, from maps {now:.1%}")
        print(f"{agree:.1%} of cubes agree")
        assert now > was - 0.02 and was > ratio + 0.3 and agree > 0.7


def test_wide_frames_keep_whole_patches(world):
    toy.write_video("wide.mp4", np.zeros((20, 48, 100, 3), np.uint8))
    segment = {"video": "wide.mp4", "captions": ["a"], "start": 0.5, "end": 1.4}
    captions.write_manifest(Path("some.jsonl"), [segment])
    run(*map_command(world))
    found = dataset.read_map(dataset.read_manifest("some.jsonl")[0]["map_path"], ["a"])
    assert found.similarity.shape == (1, 3, 8, 17) and found.frames.tolist() == [6, 10, 14]
    assert (found.size, found.resized) == ((48, 100), (64, 136))


def test_stale_maps(world, manifest):
    """Half a map or one of other captions is made anew; one of another CLIP or size only with
    --force."""
    data = manifest(3)
    run(*map_command(world))
    one, two, three = records(data)
    paths = [Path(record["maps"]) for record in (one, two, three)]
    times, whole = [path.stat().st_mtime_ns for path in paths], paths[0].read_bytes()
    run(*map_command(world))
    assert times == [path.stat().st_mtime_ns for path in paths]
    paths[0].write_bytes(whole[:700])
    with pytest.raises(ValueError, match=f"{paths[0].name}: not a whole text map .*maps makes it"):
        dataset.read_map(paths[0], one["captions"])
    with pytest.raises(ValueError, match="a text map of other captions"):
        dataset.read_map(paths[2], ["a blue star"])
    captions.write_manifest(data, [one, two, three | {"captions": ["a blue star"]}])
    run(*map_command(world))
    assert paths[0].read_bytes() == whole and paths[1].stat().st_mtime_ns == times[1]
    assert dataset.read_map(paths[2], ["a blue star"]).text.shape[0] == 1
    other = "maps some.jsonl --clip", f"local-dir:{world / 'clip'}"
    for flags, what in (
        (map_command(world, every=2), "npz: frames [0, 4"),
        (other, "npz: size [64, 64], now [224"),
    ):
        said = fails(*flags)
        assert what in said and "--force makes all anew" in said
    run(*map_command(world, every=2), "--force")
    assert dataset.read_map(paths[1], two["captions"]).similarity.shape[1] == 12
    video, size = Path(two["video"]), Path(two["video"]).stat().st_size
    toy.write_video("other.mp4", np.zeros((24, 96, 64, 3), np.uint8))
    captions.write_manifest(data, [two | {"video": "other.mp4"}])
    run(*map_command(world))
    (first,) = records(data)
    shutil.copy(video, "other.mp4")
    with pytest.raises(ValueError, match=f"had [0-9,]+ bytes, not {size:,}; .*maps makes it anew"):
        dataset.read_map(first["maps"], first["captions"], video="other.mp4")
    run(*map_command(world))
    made = dataset.read_map(first["maps"], first["captions"], video="other.mp4")
    assert made.size == (64, 64) and made.bytes == size


def test_captions_that_clip_cuts(world, manifest, capsys):
    data = manifest(2)
    one, two = records(data)
    long = " ".join(["red square"] * 60)
    captions.write_manifest(data, [one | {"captions": [long]}, two])
    run(*map_command(world))
    said = capsys.readouterr().out
    assert "captions are longer than CLIP reads, such as 'red square red" in said
    captions.write_manifest(data, [one, two])
    run(*map_command(world))
    assert "longer than CLIP" not in capsys.readouterr().out
    args = argparse.Namespace(clip="ViT-B-32", clip_pretrained=data)
    runs.note_clip(args, tgmae.load_clip(f"local-dir:{world / 'clip'}")[1], [])
    assert "some.jsonl: assumed to have ViT-B-32's activation" in capsys.readouterr().out


def test_maps_of_bad_videos(world, manifest, capsys):
    Path("bad.mp4").write_bytes(b"x" * 500)
    data = manifest(2, extra=[{"video": "bad.mp4", "captions": ["a"]}, {"video": "silent.mp4"}])
    run(*map_command(world), "--workers", 1)
    assert "maps: 2 clips, 1 failed; 1 left as they were" in capsys.readouterr().out
    assert ["maps" in record for record in records(data)] == [True, True, False, False]
    assert "Invalid data" in records(data)[2]["failed"]
    captions.write_manifest(data, [{"video": "a.mp4"}])
    assert "no clip has captions" in fails("maps some.jsonl")
    assert "--image-size 60 is not divisible" in fails("maps some.jsonl --image-size 60")


def test_the_manifest_may_be_edited_meanwhile(world, manifest, monkeypatch):
    """Records that others add while maps are made, and their keys, stay."""
    data = manifest(2)
    share = captions.share

    def edits(*args, **more):
        one, two = records(data)
        captions.write_manifest(data, [two, one | {"mine": 1}, {"video": "new.mp4"}])
        return share(*args, **more)

    monkeypatch.setattr(captions, "share", edits)
    run(*map_command(world))
    *both, new = dataset.read_manifest(data)
    assert both[1]["mine"] == 1 and records(data)[2] == {"video": "new.mp4"}
    for record in both:
        dataset.read_map(record["map_path"], record["captions"])


# ------------------------------------------------------------------------------ kills and processes


def lines_in(path):
    try:
        return path.read_text().count("\n")
    except FileNotFoundError:  # not yet, or no more: the command is done
        return 0


@needs_transformers
def test_an_unfinished_command_is_not_mixed_with_another(bare, blip2, monkeypatch):
    data = bare(4)
    flags = "caption some.jsonl --source blip2 --batch-size 2 --workers 0 --model", blip2
    before, load, calls = data.read_bytes(), captions.load_keyframes, []

    def stops(clips, count, key):
        calls.append(key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return load(clips, count, key)

    monkeypatch.setattr(captions, "load_keyframes", stops)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    assert data.read_bytes() == before
    assert "unfinished work with {'frames': 3}; finish it" in fails(*flags, "--frames", 1)
    assert "'source': 'blip2'" in fails("caption some.jsonl --source label")
    with open("some.jsonl.work/0.jsonl", "a") as file:
        file.write('{"key": "half a li}')
    first, *rest = records(data)
    captions.write_manifest(data, [first, *rest, first | {"start": 0.5}])  # edited meanwhile
    run(*flags)
    assert len(calls) == 6  # two were done, one was lost in flight, three more
    assert [len(record["captions"]) for record in records(data)] == [3] * 5
    assert not Path("some.jsonl.work").exists()


def outcome(folder):
    """What the two commands leave: the manifest's records, the files' names, and the maps."""
    found = records(folder / "some.jsonl")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return found, files, [dict(np.load(folder / record["maps"])) for record in found]


def assert_same(one, other):
    assert one[:2] == other[:2]
    for map_of_one, map_of_other in zip(one[2], other[2], strict=True):
        assert map_of_one.keys() == map_of_other.keys()
        for name, value in map_of_one.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(value, map_of_other[name], atol=1e-3)
            else:
                np.testing.assert_array_equal(value, map_of_other[name])


@pytest.fixture(scope="module")
def undisturbed(world, blip2, tmp_path_factory):
    """fresh(name) -> a folder with a manifest of 48 toy clips without captions, and the commands
    that caption and map them; what these leave when one process runs them."""
    caption = "caption some.jsonl --source blip2 --batch-size 2 --workers 1 --model".split()
    line, clip = map_command(world)
    commands = [*caption, blip2], [*line.split(), clip, "--workers", 1]
    made = dataset.read_manifest(world / "manifest.jsonl", "train")[:48]

    def fresh(name):
        folder = tmp_path_factory.mktemp(name)
        lines = [{"video": r["path"], "label": r["label"]} for r in made]
        captions.write_manifest(folder / "some.jsonl", lines)
        return folder, commands

    folder, _ = fresh("whole")
    for command in commands:
        assert torchrun(1, ROOT / "captions.py", *command, cwd=folder).returncode == 0
    return fresh, outcome(folder)


@needs_transformers
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work(processes, undisturbed):
    fresh, whole = undisturbed
    folder, commands = fresh("shared")
    for command in commands:
        done = torchrun(processes, ROOT / "captions.py", *command, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert_same(whole, outcome(folder))


@needs_transformers
@pytest.mark.slow
def test_killed_at_random_and_run_again(undisturbed):
    """SIGKILL at random moments of the work of each command: the outcome of an undisturbed run."""
    fresh, whole = undisturbed
    folder, commands = fresh("killed")
    journal, rng = folder / "some.jsonl.work/0.jsonl", random.Random(0)
    for command in commands:
        words, kills = [sys.executable, ROOT / "captions.py", *map(str, command)], []
        while len(kills) < KILLS:
            # The settings are two lines; a batch's or a clip's outcome follows.
            awaited = lines_in(journal) + rng.randint(1, 4)
            process = subprocess.Popen(words, cwd=folder, stderr=subprocess.DEVNULL)
            while process.poll() is None and lines_in(journal) < awaited:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            if process.poll() is not None:
                break  # a fast machine: it is done
            process.kill()
            process.wait()
            kills.append(lines_in(journal))
        print(f"{command[0]}: {len(kills)} kills, lines of the journal at each: {kills}")
        assert len(kills) >= 2, "finished before it could be killed: more clips, please"
        assert subprocess.run(words, cwd=folder, capture_output=True).returncode == 0
    assert_same(whole, outcome(folder))
