"""captions.py: each dataset's annotation files, captions from tiny models of the real classes, and
kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_transformers
from test_ranks import torchrun

import captions
import dataset
import tgmae
import toy


def run(*argv):
    captions.main([str(word) for word in argv])


def fails(*argv):
    """Runs with a mistake in it -> the one line that it says."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code, stop.value.code
    return stop.value.code


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_name(path):
    return {record["video"].rsplit("/", 1)[-1]: record for record in records(path)}


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """A small video, each frame of which shows its own number as 8 black or white bars."""
    path = tmp_path_factory.mktemp("video") / "numbered.mp4"
    frames = np.zeros((50, 64, 64, 3), np.uint8)
    for number in range(50):
        for bit in range(8):
            frames[number, :, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
    toy.write_video(path, frames)
    return path


def number_of(frame):
    bars = frame.float().mean((0, 2)).view(8, 8).mean(1) > 128
    return sum(int(bar) << bit for bit, bar in enumerate(bars))


@pytest.fixture
def tree(tmp_path, clip_file):
    """tree({"a/b.mp4": None, "list.txt": "text"}) -> a folder with a video or a text at each
    path."""

    def make(files, root="data"):
        for name, text in files.items():
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                os.link(clip_file, path)
            else:
                path.write_text(text if isinstance(text, str) else json.dumps(text))
        return tmp_path / root

    return make


# ------------------------------------------------------------------------------------- index


def test_k400(tree, tmp_path, capsys):
    header = "label,youtube_id,time_start,time_end,split,is_cc\n"
    root = tree(
        {
            "train.csv": header
            + "playing chess,-abc_1,5,15,train,0\n"
            + '"cooking, outdoors",x y,0,10,train,0\n'
            + "abseiling,gone,1,11,train,0\n",
            "val.csv": header + "abseiling,def,20,30,validate,1\n",
            "test.csv": "youtube_id,time_start,time_end,split\nghi,7,17,test\n",
            "videos/playing_chess/-abc_1_000005_000015.mp4": None,
            "videos/x y_000000_000010.mp4": None,
            "videos/val/abseiling/def.mkv": None,
            "videos/test/ghi_000007_000017.mp4": None,
        }
    )
    run("index", "k400", root, "--out", tmp_path / "k.jsonl")
    found = by_name(tmp_path / "k.jsonl")
    assert found["-abc_1_000005_000015.mp4"] == {
        "video": "data/videos/playing_chess/-abc_1_000005_000015.mp4",
        "split": "train",
        "label": "playing chess",
    }
    assert found["x y_000000_000010.mp4"]["label"] == "cooking, outdoors"
    assert found["def.mkv"]["split"] == "val" and "label" not in found["ghi_000007_000017.mp4"]
    problems = (tmp_path / "k.index-problems.txt").read_text()
    assert "train.csv:4\tno video gone_000001_000011" in problems and problems.count("\n") == 1
    said = capsys.readouterr().out
    assert "train: 2 found, 1 missing, 0 unreadable; 2 labels" in said and "val: 1 found" in said


def test_ssv2(tree, tmp_path):
    old = "something-something-v2-"
    rows = [
        {"id": "78687", "label": "holding potato next to vicks vaporub bottle",
         "placeholders": ["potato"],
         "template": "Holding [something] next to [something]"},
        {"id": "9", "label": "pushing a cup", "template": "Pushing [something]",
         "placeholders": ["a cup"]},
    ]  # fmt: skip
    labels = {"Holding something next to something": "41", "Pushing something": "7"}
    for prefix in (old, ""):
        root = tree(
            {
                f"{prefix}train.json": rows[:1],
                f"{prefix}validation.json": rows[1:],
                f"{prefix}test.json": [{"id": "3"}],
                f"{prefix}labels.json": labels,
                "78687.webm": None,
                "9.webm": None,
                "mp4/9.mp4": None,
                "3.webm": None,
            },
            root=f"data{prefix}",
        )
        out = tmp_path / f"s{prefix}.jsonl"
        run("index", "ssv2", root, "--out", out)
        found = by_name(out)
        assert found["78687.webm"] == {
            "video": f"data{prefix}/78687.webm",
            "split": "train",
            "label": "Holding something next to something",
            "class_id": 41,
            "human_captions": ["holding potato next to vicks vaporub bottle"],
        }
        assert found["9.mp4"]["split"] == "val"  # of two, the one with motion vectors
        assert found["3.webm"] == {"video": f"data{prefix}/3.webm", "split": "test"}


def test_ucf101(tree, tmp_path):
    root = tree(
        {
            "lists/classInd.txt": "1 ApplyEyeMakeup\n2 YoYo\n",
            "lists/trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\n",
            "lists/testlist01.txt": "YoYo/v_YoYo_g01_c01.avi\n",
            "lists/trainlist02.txt": "YoYo/v_YoYo_g01_c01.avi 1\n",
            "lists/testlist02.txt": "",
            "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi": None,
            "v_YoYo_g01_c01.mp4": None,
        }
    )
    run("index", "ucf101", root, "--annotations", root / "lists", "--out", tmp_path / "u.jsonl")
    assert records(tmp_path / "u.jsonl") == [
        {
            "video": "data/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
            "label": "ApplyEyeMakeup",
            "class_id": 0,
            "split": "train",
        },
        {"video": "data/v_YoYo_g01_c01.mp4", "label": "YoYo", "class_id": 1, "split": "test"},
    ]
    said = fails(
        "index",
        "ucf101",
        root,
        "--annotations",
        root / "lists",
        "--fold",
        2,
        "--out",
        tmp_path / "v.jsonl",
    )
    assert "trainlist02.txt:1: class 1, but classInd.txt says that YoYo is 2" in said


def test_hmdb51(tree, tmp_path):
    names = "#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi", "a;b&(c) d.avi", "left_out.avi"
    root = tree(
        {
            "splits/clap_test_split1.txt": "".join(
                f"{name} {code}\n" for name, code in zip(names, (1, 2, 0))
            ),
            "splits/clap_test_split2.txt": f"{names[0]} 2 \n",
            **{f"clap/{name}": None for name in names},
            "wave/" + names[0]: None,
        }
    )
    run("index", "hmdb51", root, "--annotations", root / "splits", "--out", tmp_path / "h.jsonl")
    assert records(tmp_path / "h.jsonl") == [
        {"video": f"data/clap/{names[0]}", "label": "clap", "split": "train"},
        {"video": f"data/clap/{names[1]}", "label": "clap", "split": "test"},
    ]
    run(
        "index",
        "hmdb51",
        root,
        "--annotations",
        root / "splits",
        "--fold",
        2,
        "--out",
        tmp_path / "h2.jsonl",
    )
    assert [record["split"] for record in records(tmp_path / "h2.jsonl")] == ["test"]


def test_diving48(tree, tmp_path):
    entry = {"start_frame": 0, "end_frame": 150}
    root = tree(
        {
            "Diving48_vocab.json": [
                ["Back", "15som", "05Twis", "FREE"],
                ["Forward", "Dive", "NoTwis", "PIKE"],
            ],
            "Diving48_V2_train.json": [{"vid_name": "a_00000", "label": 1, **entry}],
            "Diving48_V2_test.json": [{"vid_name": "b_00001", "label": 0, **entry}],
            "rgb/a_00000.mp4": None,
            "rgb/b_00001.mp4": None,
        }
    )
    run("index", "diving48", root, "--out", tmp_path / "d.jsonl")
    assert records(tmp_path / "d.jsonl") == [
        {
            "video": "data/rgb/a_00000.mp4",
            "label": "Forward Dive NoTwis PIKE",
            "class_id": 1,
            "split": "train",
        },
        {
            "video": "data/rgb/b_00001.mp4",
            "label": "Back 15som 05Twis FREE",
            "class_id": 0,
            "split": "test",
        },
    ]
    tree({"Diving48_V2_test.json": [{"vid_name": "b_00001", "label": 2}]})
    assert "Diving48_V2_test.json: entry 1: 2 is unknown or missing" in fails(
        "index", "diving48", root
    )


def test_epic55(tree, tmp_path):
    header = (
        "uid,participant_id,video_id,narration,start_timestamp,stop_timestamp,start_frame,stop_frame,verb,verb_class,"
        "noun,noun_class,all_nouns,all_noun_classes\n"
    )
    rest = "take,0,board,1,\"['board:chopping', 'tap']\",\"[1, 0]\"\n"
    root = tree(
        {
            "EPIC_train_action_labels.csv": header
            + "0,P01,P01_01,take the board,00:00:00.50,00:00:02.04,30,122,"
            + rest
            + "9,P26,P26_03,take it,01:01:01.25,01:01:02.00,1,2,"
            + rest,
            "EPIC_verb_classes.csv": "verb_id,class_key,verbs\n0,take,\"['take', 'grab']\"\n",
            "EPIC_noun_classes.csv": "noun_id,class_key,nouns\n0,tap,['tap']\n"
            "1,board:chopping,['board']\n",
            "P01/P01_01.MP4": None,
            "P26/P26_03.MP4": None,
        }
    )
    run("index", "epic55", root, "--out", tmp_path / "e.jsonl")
    one, two = records(tmp_path / "e.jsonl")
    assert one == {
        "video": "data/P01/P01_01.MP4",
        "label": "take board:chopping",
        "split": "train",
        "start": 0.5,
        "end": 2.04,
        "human_captions": ["take the board"],
    }
    assert (two["split"], two["start"], two["end"]) == ("val", 3661.25, 3662.0)
    assert captions.sentence(one["label"]) == "Take chopping board."


def test_list(tree, tmp_path):
    root = tree(
        {
            "train.csv": "a b/c, d.mp4 1\nplain.mp4 0\n",
            "k400_val_list_videos.txt": "val/x.mp4\triding a bike\n",
            "names.names": "abseiling\nair drumming\n",
            "a b/c, d.mp4": None,
            "plain.mp4": None,
            "val/x.mp4": None,
        }
    )
    run("index", "list", root, "--classes", root / "names.names", "--out", tmp_path / "l.jsonl")
    assert sorted(records(tmp_path / "l.jsonl"), key=lambda r: r["video"]) == [
        {"video": "data/a b/c, d.mp4", "label": "air drumming", "class_id": 1, "split": "train"},
        {"video": "data/plain.mp4", "label": "abseiling", "class_id": 0, "split": "train"},
        {"video": "data/val/x.mp4", "label": "riding a bike", "split": "val"},
    ]
    tree({"other/absolute.txt": f"{root}/plain.mp4,7\nno_suffix 3\n"})
    run(
        "index",
        "list",
        root,
        "--annotations",
        root / "other/absolute.txt",
        "--out",
        tmp_path / "m.jsonl",
    )
    assert records(tmp_path / "m.jsonl")[0]["label"] == "7"
    assert "absolute.txt:2\tno video no_suffix" in (tmp_path / "m.index-problems.txt").read_text()
    assert "label 7 is a number" in fails("caption", tmp_path / "m.jsonl", "--source", "label")


def test_folder(tree, tmp_path, capsys):
    root = tree(
        {
            "train/wave/a.mp4": None,
            "val/wave/b.mp4": None,
            "train/jump/bad.mp4": "no video",
            "train/jump/empty.mp4": "",
        }
    )
    (root / "train/jump/gone.mp4").symlink_to("nowhere.mp4")
    run("index", root, "--out", tmp_path / "f.jsonl")
    # An empty file, or a link to none, needs no decoding.
    assert set(by_name(tmp_path / "f.jsonl")) == {"a.mp4", "b.mp4", "bad.mp4"}
    assert "f.jsonl: exists" in fails("index", root, "--out", tmp_path / "f.jsonl")
    (root / "train/jump/bad.mp4").unlink()
    run("index", root, "--out", tmp_path / "f.jsonl", "--force")
    assert by_name(tmp_path / "f.jsonl") == {
        "a.mp4": {"video": "data/train/wave/a.mp4", "label": "wave", "split": "train"},
        "b.mp4": {"video": "data/val/wave/b.mp4", "label": "wave", "split": "val"},
    }
    assert "train: 1 found, 0 missing, 2 unreadable" in capsys.readouterr().out
    assert "empty.mp4: empty, or a link" in (tmp_path / "f.index-problems.txt").read_text()
    assert not (tmp_path / "f.jsonl.work").exists()
    said = fails(
        "index",
        tree({"bad.mp4": "", "worse.mp4": ""}, root="all bad"),
        "--out",
        tmp_path / "b.jsonl",
    )
    assert "all bad: none of 2 videos can be read" in said and not (tmp_path / "b.jsonl").exists()


def test_annotation_mistakes_name_file_and_line(tree, tmp_path):
    good = "label,youtube_id,time_start,time_end,split\n"
    for files, name, reason in (
        ({}, "k400", "there is no train.csv or validate.csv or val.csv or test.csv"),
        ({"train.csv": "label,youtube_id\na,b\n"}, "k400",
         "train.csv:2: 'split' is unknown or missing"),
        ({"train.csv": good + "a,b,1,2\n"}, "k400", "train.csv:2: not the header's 5 fields"),
        ({"train.csv": good + "a,b,one,2,train\n"}, "k400",
         "train.csv:2: invalid literal for int() with base 10: 'one'"),
        ({"train.csv": good + "a,b,1,2,dev\n"}, "k400", "train.csv:2: 'dev' is unknown or missing"),
        ({"train.csv": good + "a,b,1,2,train\n"}, "k400",
         "none of the 1 listed, such as b_000001"),
        ({"train.json": "{", "labels.json": {}}, "ssv2", "train.json: Expecting property name"),
        ({"train.json": [{}], "labels.json": {}}, "ssv2",
         "train.json: entry 1: 'id' is unknown or missing"),
        ({"train.json": [{"id": 1, "template": "X [y]", "label": "x"}], "labels.json": {}}, "ssv2",
         "entry 1: 'X y' is unknown or missing"),
        ({"train.json": [{"id": 1, "template": "X", "label": " "}], "labels.json": {"X": 0}},
         "ssv2", "entry 1: an empty caption"),
        ({}, "hmdb51", "there is no *_test_split1.txt"),
        ({"a_test_split1.txt": "a.avi 3\n"}, "hmdb51",
         "a_test_split1.txt:1: '3' is unknown or missing"),
        ({}, "list", "there is no *.csv or *.txt"),
        ({"train.json": ["x"], "labels.json": {}}, "ssv2", "train.json: entry 1: string indices"),
        ({"train.csv": b"\xff".decode("latin-1") + good, "labels.json": ""}, "ssv2",
         "labels.json: Expecting value"),
        ({"train.txt": "word\n"}, "list", "train.txt:1: not `path label`"),
    ):  # fmt: skip
        root = tree(files | {"video.mp4": None}, root=f"case{random.random()}")
        assert reason in fails("index", name, root, "--out", tmp_path / "x.jsonl"), files
    assert "nowhere: no such folder" in fails("index", tmp_path / "nowhere")
    assert not (tmp_path / "x.jsonl").exists()


# ------------------------------------------------------------------------------------- caption


def tiny_tokenizer(folder, words):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "<image>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    fast.save_pretrained(folder)
    return fast, len(vocabulary)


WORDS = [f"word{i}" for i in range(60)]


OPT = dict(
    model_type="opt", hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
    word_embed_proj_dim=16, max_position_embeddings=128, bos_token_id=1, eos_token_id=1,
    pad_token_id=0,
)  # fmt: skip
T5 = dict(
    model_type="t5", d_model=16, d_ff=32, d_kv=8, num_layers=1, num_decoder_layers=1, num_heads=2,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip


def tiny_blip2(folder, text_config):
    """Blip2ForConditionalGeneration of a few thousand parameters, and its processor."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
    )

    tokenizer, size = tiny_tokenizer(folder, WORDS)
    wide = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = Blip2Config(
        vision_config=dict(**wide, image_size=28, patch_size=7),
        qformer_config=dict(**wide, encoder_hidden_size=16, vocab_size=size),
        text_config=dict(**text_config, vocab_size=size),
        num_query_tokens=4,
        image_token_index=3,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    for p in model.parameters():
        p.data.normal_(std=0.7)  # so that different frames get different captions
    model.save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    return tiny_blip2(tmp_path_factory.mktemp("blip2"), OPT)


@needs_transformers
def test_blip2_with_a_t5(manifest, tmp_path):
    """As common as OPT; it has no token to start from."""
    data = manifest(3)
    made = [{"video": record["video"]} for record in records(data)]
    captions.write_manifest(data, made)
    model = tiny_blip2(tmp_path / "t5", T5)
    run("caption", data, "--source", "blip2", "--model", model, "--workers", 0)
    said = [record["captions"] for record in records(data)]
    assert all(said) and all(set(text.split()) <= set(WORDS) for texts in said for text in texts)
    assert len({text for texts in said for text in texts}) > 1


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A Llama of a few thousand parameters with its tokenizer, in a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llm")
    _, size = tiny_tokenizer(folder, WORDS)
    wide = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=size, **wide, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_keyframes(clip_file):
    """(2i+1)n/(2k), of the whole and of a segment, read from the numbers that the frames show."""
    assert captions.keyframes(0, 50, 1) == [25] and captions.keyframes(10, 40, 3) == [15, 25, 35]
    for segment, count, wanted in (
        ({}, 3, [8, 25, 41]),
        ({}, 1, [25]),
        ({"start": 1.0, "end": 2.0}, 3, [14, 18, 22]),
    ):
        clips = {"k": {"path": str(clip_file), **segment}}
        frames = captions.load_keyframes(clips, count, "k")  # 12 frames a second
        assert [number_of(frame) for frame in frames] == wanted


@needs_transformers
def test_blip2(manifest, blip2, tmp_path, capsys, monkeypatch):
    """Each frame gets what the model says of it alone, whatever the batch; who cannot be read goes
    without."""
    monkeypatch.setattr(tgmae, "bf16_is_fast", lambda device: False)
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    data = manifest(5, extra=[{"video": "gone.mp4", "label": "x"}])
    bare = [{k: v for k, v in record.items() if k != "captions"} for record in records(data)]
    captions.write_manifest(data, [{**bare[0], "captions": ["mine"]}, *bare[1:]])
    run("caption", data, "--source", "blip2", "--model", blip2, "--batch-size", 2, "--workers", 2)
    said = records(data)
    assert said[0]["captions"] == ["mine"] and "captions" not in said[5]
    assert "gone.mp4: No such file" in said[5]["failed"]
    assert "caption: 4 clips, 1 failed; 1 left as they were" in capsys.readouterr().out
    assert "gone.mp4" in (tmp_path / "some.caption-problems.txt").read_text()

    model, processor = (
        Blip2ForConditionalGeneration.from_pretrained(blip2),
        Blip2Processor.from_pretrained(blip2),
    )
    for record in said[1:5]:
        frames = dataset.read_clip(str(tmp_path / record["video"]), [4, 12, 20])
        for text, frame in zip(record["captions"], frames, strict=True):
            pixels = processor(images=frame.permute(2, 0, 1), return_tensors="pt")["pixel_values"]
            expected = processor.decode(
                model.generate(pixel_values=pixels, max_new_tokens=60)[0], skip_special_tokens=True
            )
            assert text == expected.strip() and text.startswith("word")
    assert len({text for record in said[1:5] for text in record["captions"]}) > 1
    middle = [record["captions"][1] for record in said[1:5]]
    run(
        "caption",
        data,
        "--source",
        "blip2",
        "--model",
        blip2,
        "--frames",
        1,
        "--force",
        "--workers",
        0,
    )
    assert [record["captions"] for record in records(data)[1:5]] == [
        [text] for text in middle
    ]  # the centre frame


@needs_transformers
def test_llm(manifest, llm, capsys, monkeypatch):
    asked = []
    answers = captions.Llm.answers
    monkeypatch.setattr(
        captions.Llm, "answers", lambda self, prompt: asked.append(prompt) or answers(self, prompt)
    )
    data = manifest(20)
    captions.write_manifest(data, [record | {"captions": []} for record in records(data)])
    flags = (
        "caption",
        data,
        "--source",
        "llm",
        "--model",
        llm,
        "--per-prompt",
        2,
        "--max-new-tokens",
        5,
    )
    run(*flags)
    first = records(data)
    assert len(asked) == 3 * 16 and asked[:3] == [  # once a class
        "Describe the action circle down.",
        "What does a person circle down look like?",
        "What does the act of circle down look like?",
    ]
    assert first[0]["captions"] == first[16]["captions"] and len(first[0]["captions"]) == 6
    assert all(set(text.split()) <= set(WORDS) | {"<unk>"} for r in first for text in r["captions"])
    run(*flags, "--force")
    assert records(data) == first  # the seed decides, not the order of what was asked before
    run(*flags, "--force", "--seed", 1)
    assert records(data)[0]["captions"] != first[0]["captions"]


def test_chat_template_is_used(llm, tmp_path, manifest):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.chat_template = "{% for m in messages %}word1 {{ m.content }} word2{% endfor %}"
    args = captions.parse_args(
        ["caption", "x", "--source", "llm", "--model", str(llm), "--max-new-tokens", "5"]
    )
    args.device = "cpu"
    teller = captions.Llm(args)
    plain = teller.answers("word7")
    teller.tokenizer = tokenizer
    seen = []
    generate = teller.model.generate
    teller.model.generate = lambda **more: (
        seen.append(more["input_ids"][0].tolist()) or generate(**more)
    )
    chat = teller.answers("word7")
    words = tokenizer.convert_tokens_to_ids(["word1", "word7", "word2"])
    assert [token for token in seen[0] if token > 3] == words and len(chat) == len(plain) == 3


def test_append_and_human(manifest):
    data = manifest(2)
    lines = records(data)
    captions.write_manifest(
        data, [lines[0] | {"human_captions": ["as said"], "other": [1]}, lines[1]]
    )
    run("caption", data, "--source", "human", "--append")
    said = records(data)
    assert said[0]["captions"] == lines[0]["captions"] + ["as said"] and said[0]["other"] == [1]
    assert "no human_captions" in said[1]["failed"] and said[1]["captions"] == lines[1]["captions"]
    run("caption", data, "--source", "label", "--append")
    run("caption", data, "--source", "label", "--append")  # twice the same adds nothing
    assert records(data)[0]["captions"] == lines[0]["captions"] + ["as said", "Circle left."]
    run("caption", data, "--source", "label")
    assert len(records(data)[0]["captions"]) == 5  # without --force nothing is replaced
    run("caption", data, "--source", "label", "--force")
    assert records(data)[0]["captions"] == ["Circle left."]


def test_sentences():
    for label, text in (
        ("ApplyEyeMakeup", "Apply eye makeup."), ("apply_eye_makeup", "Apply eye makeup."),
        ("YoYo", "Yo yo."),
        ("turn-on tap", "Turn-on tap."), ("playing TV games", "Playing TV games."),
    ):  # fmt: skip
        assert captions.sentence(label) == text


# ------------------------------------------------------------------------------------- maps


def map_flags(world):
    return (
        "--clip",
        f"local-dir:{world / 'clip'}",
        "--image-size",
        64,
        "--patch-size",
        8,
        "--every",
        4,
    )


def test_map_equals_online_scores(world, manifest, tmp_path, monkeypatch):
    """For crops that fall on whole patches a map holds what text_scores computes on the crop."""
    monkeypatch.setattr(tgmae, "bf16_is_fast", lambda device: False)
    data = manifest(3)
    run("maps", data, *map_flags(world))
    clip = tgmae.load_clip(f"local-dir:{world / 'clip'}")
    for record in dataset.read_manifest(data):
        found = dataset.read_map(record["map_path"], record["captions"])
        assert found.similarity.shape == (3, 6, 8, 8) and found.similarity.dtype == torch.float16
        assert found.frames.tolist() == [0, 4, 8, 12, 16, 20] and found.text.shape == (3, 64)
        assert found.size == found.resized == (64, 64) and found.patch_size == 8
        frames = dataset.read_clip(record["path"], found.frames.tolist())
        for number, caption in enumerate(record["captions"]):
            text = tgmae.encode_text(*clip, [caption])
            torch.testing.assert_close(found.text[number].float(), text[0], atol=1e-3, rtol=0)
            for crop in (
                dataset.Crop(0, 0, 64, 64),
                dataset.Crop(16, 24, 32, 32),
                dataset.Crop(8, 0, 40, 40),
            ):
                video = tgmae.normalize(dataset.crop_frames(frames, crop, crop.height)[None])
                online = tgmae.text_scores(clip[0], video, text, 8, 1)[0]
                cropped = dataset.crop_map(found.similarity[number], crop, found.size, online.shape)
                torch.testing.assert_close(cropped, online, atol=1e-3, rtol=0)
                mirrored = dataset.crop_map(
                    found.similarity[number], crop._replace(flip=True), found.size, online.shape
                )
                assert torch.equal(mirrored, cropped.flip(-1))  # CLIP saw the patches as they were
    with np.load(record["map_path"], allow_pickle=False) as file:
        assert file["captions"].tolist() == record["captions"] and all(
            file[k].dtype != object for k in file.files
        )


def test_crop_map_between_cells():
    """Bilinear at the centre of each patch of the crop, by a naive loop."""
    similarity = torch.randn(2, 5, 7).double()
    crop, size, grid = dataset.Crop(13, 31, 90, 60, flip=True), (100, 140), (2, 3, 4)
    cropped = dataset.crop_map(similarity, crop, size, grid)
    for s in range(2):
        for i in range(3):
            for j in range(4):
                y = (crop.top + (i + 0.5) * crop.height / 3) / size[0] * 5 - 0.5
                x = (crop.left + (j + 0.5) * crop.width / 4) / size[1] * 7 - 0.5
                y0, x0 = int(y // 1), int(x // 1)
                value = 0
                for a, wa in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
                    for b, wb in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
                        value += (
                            wa * wb * similarity[s, min(max(a, 0), 4), min(max(b, 0), 6)].item()
                        )
                assert cropped[s, i, 3 - j].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.slow
def test_masks_from_maps_cover_what_online_masks_cover(full_world, tmp_path):
    """Random crops, flips and times of the 200 test clips: within two points of online masks, at
    both ratios."""
    data = tmp_path / "test.jsonl"
    made = dataset.read_manifest(full_world / "manifest.jsonl", "test")
    captions.write_manifest(data, [{"video": r["path"], "captions": r["captions"]} for r in made])
    run("maps", data, *map_flags(full_world))
    config, truth = tgmae.PRESETS["toy"], toy.read_truth(full_world)
    generator = torch.Generator().manual_seed(0)
    videos, texts, from_map, areas = [], [], [], []
    for i, (record, original) in enumerate(zip(dataset.read_manifest(data), made)):
        numbers = dataset.clip_indices(0, toy.FRAMES, config.num_frames, 4, generator=generator)
        crop = dataset.multi_scale_crop((toy.SIZE, toy.SIZE), generator=generator)
        videos.append(
            dataset.crop_frames(dataset.read_clip(record["path"], numbers), crop, config.image_size)
        )
        found = dataset.read_map(record["map_path"], record["captions"])
        texts.append(found.text[i % 3])
        from_map.append(
            dataset.map_scores(found, i % 3, numbers[::2], crop, found.size, config.grid)
        )
        actor = np.repeat(truth[original["video"]][0, numbers, :, :, None], 3, axis=-1)
        areas.append(
            dataset.crop_frames(
                torch.from_numpy(actor.astype(np.uint8) * 255), crop, config.image_size
            )
        )
    clip = tgmae.load_clip(f"local-dir:{full_world / 'clip'}")[0]
    online = tgmae.text_scores(clip, tgmae.normalize(torch.stack(videos)), torch.stack(texts), 8, 2)
    area = tgmae.patchify(torch.stack(areas).float(), 8, 2).mean(-1)  # (B,N)
    for ratio in (0.25, 0.6):
        masks = [tgmae.topk_mask(scores, ratio) for scores in (online, torch.stack(from_map))]
        covered = [((mask * area).sum() / area.sum()).item() for mask in masks]
        agree = (masks[0] == masks[1]).float().mean().item()
        print(
            f"ratio {ratio}: actor covered online {covered[0]:.1%}, from maps {covered[1]:.1%}; "
            f"{agree:.1%} of cubes agree"
        )
        assert covered[1] > covered[0] - 0.02 and covered[0] > ratio + 0.3 and agree > 0.7


def test_wide_frames_keep_whole_patches(world, tmp_path):
    frames = np.zeros((20, 48, 100, 3), np.uint8)
    toy.write_video(tmp_path / "wide.mp4", frames)
    (tmp_path / "w.jsonl").write_text(
        '{"video": "wide.mp4", "captions": ["a"], "start": 0.5, "end": 1.4}\n'
    )
    run("maps", tmp_path / "w.jsonl", *map_flags(world))
    record = dataset.read_manifest(tmp_path / "w.jsonl")[0]
    found = dataset.read_map(record["map_path"], ["a"])
    assert found.similarity.shape == (1, 3, 8, 17) and found.frames.tolist() == [6, 10, 14]
    assert (found.size, found.resized) == ((48, 100), (64, 136))


def test_stale_maps(world, manifest, tmp_path, capsys):
    """Half a map or one of other captions is made anew; one of another CLIP or size only with
    --force."""
    data = manifest(3)
    run("maps", data, *map_flags(world))
    paths = [tmp_path / record["maps"] for record in records(data)]
    whole = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    run("maps", data, *map_flags(world))
    assert times == [path.stat().st_mtime_ns for path in paths]
    paths[0].write_bytes(whole[0][:700])
    with pytest.raises(
        ValueError, match=f"{paths[0].name}: not a whole text map .*maps makes it anew"
    ):
        dataset.read_map(paths[0], records(data)[0]["captions"])
    with pytest.raises(ValueError, match="a text map of other captions"):
        dataset.read_map(paths[2], ["something else"])
    captions.write_manifest(
        data, [*records(data)[:2], records(data)[2] | {"captions": ["a blue star"]}]
    )
    run("maps", data, *map_flags(world))
    assert paths[0].read_bytes() == whole[0] and paths[1].stat().st_mtime_ns == times[1]
    assert dataset.read_map(paths[2], ["a blue star"]).text.shape[0] == 1
    for flags, what in (
        ([*map_flags(world)[:-1], 2], "npz: frames [0, 4"),
        (map_flags(world)[:2], "npz: size [64, 64], now [224"),
    ):
        said = fails("maps", data, *flags)
        assert what in said and "--force makes all anew" in said
    run("maps", data, *map_flags(world)[:-1], 2, "--force")
    assert dataset.read_map(paths[1], records(data)[1]["captions"]).similarity.shape[1] == 12


def test_maps_of_bad_videos(world, manifest, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_bytes(b"x" * 500)
    data = manifest(2, extra=[{"video": "bad.mp4", "captions": ["a"]}, {"video": "silent.mp4"}])
    run("maps", data, *map_flags(world), "--workers", 1)
    assert "maps: 2 clips, 1 failed; 1 left as they were" in capsys.readouterr().out
    good, _, bad, silent = records(data)
    assert (
        "Invalid data" in bad["failed"]
        and "maps" in good
        and "maps" not in bad
        and "maps" not in silent
    )
    (tmp_path / "none.jsonl").write_text('{"video": "a.mp4"}\n')
    assert "no clip has captions" in fails("maps", tmp_path / "none.jsonl")
    assert "--image-size 60 is not divisible" in fails("maps", data, "--image-size", 60)


# ------------------------------------------------------------------------------ kills and processes


def everything(folder):
    """What the two commands leave: the manifest's records, and the maps."""
    found = records(folder / "some.jsonl")
    arrays = {}
    for record in found:
        with np.load(folder / record["maps"], allow_pickle=False) as file:
            arrays[record["video"]] = {name: file[name] for name in file.files}
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return found, arrays, files


def assert_same(one, other):
    assert one[0] == other[0] and one[2] == other[2]
    for video, arrays in one[1].items():
        for name, value in arrays.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(other[1][video][name], value, atol=1e-3)
            else:
                assert (other[1][video][name] == value).all()


@pytest.fixture(scope="module")
def undisturbed(world, blip2, tmp_path_factory):
    """A manifest of 24 toy clips without captions, and what BLIP-2 and maps make of it in one
    process."""

    def fresh(name):
        folder = tmp_path_factory.mktemp(name)
        made = dataset.read_manifest(world / "manifest.jsonl", "train")[:24]
        captions.write_manifest(
            folder / "some.jsonl", [{"video": r["path"], "label": r["label"]} for r in made]
        )
        return folder, (
            (
                *"caption some.jsonl --source blip2 --batch-size 2 --workers 1 --model".split(),
                blip2,
            ),
            ("maps", "some.jsonl", *map_flags(world), "--workers", 1),
        )

    folder, commands = fresh("whole")
    for command in commands:
        assert torchrun(1, ROOT / "captions.py", *command, cwd=folder).returncode == 0
    return fresh, everything(folder)


@needs_transformers
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work(processes, undisturbed):
    fresh, whole = undisturbed
    folder, commands = fresh("shared")
    for command in commands:
        done = torchrun(processes, ROOT / "captions.py", *command, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert_same(whole, everything(folder))


@needs_transformers
@pytest.mark.slow
def test_killed_at_random_and_run_again(undisturbed):
    """SIGKILL at ten random moments of the work, five in each command: the outcome of an
    undisturbed run."""
    fresh, whole = undisturbed
    folder, commands = fresh("killed")
    rng = random.Random(0)
    for command in commands:
        kills = 0
        while kills < 5:
            words = [sys.executable, str(ROOT / "captions.py"), *map(str, command)]
            process = subprocess.Popen(
                words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            # From the moment that the journal is open: before, there is nothing to lose.
            journal = folder / "some.jsonl.work/0.jsonl"
            before = sum(1 for _ in open(journal)) if journal.exists() else 0
            while process.poll() is None and not grown(journal, before):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.15))
            if process.poll() is not None:
                break  # a fast machine: it is done
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        assert kills >= 2, "finished before it could be killed: more clips, please"
        assert subprocess.run(words, cwd=folder, capture_output=True).returncode == 0
    assert_same(whole, everything(folder))


def grown(path, lines):
    return path.exists() and sum(1 for _ in open(path)) > lines


@needs_transformers
def test_an_unfinished_command_is_not_mixed_with_another(manifest, blip2, tmp_path, monkeypatch):
    data = manifest(4)
    captions.write_manifest(data, [record | {"captions": []} for record in records(data)])
    flags = (
        "caption",
        data,
        "--source",
        "blip2",
        "--model",
        blip2,
        "--batch-size",
        2,
        "--workers",
        0,
    )
    before = data.read_bytes()
    load = captions.load_keyframes
    calls = []

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
    assert "'source': 'blip2'" in fails("caption", data, "--source", "label")
    with open(tmp_path / "some.jsonl.work/0.jsonl", "a") as file:
        file.write('{"key": "half a li}')
    captions.write_manifest(
        data, records(data) + [records(data)[0] | {"start": 0.5}]
    )  # edited meanwhile
    run(*flags)
    assert len(calls) == 6  # two were done, one was lost in flight, three more
    assert len(records(data)) == 5 and all(len(record["captions"]) == 3 for record in records(data))
    assert not (tmp_path / "some.jsonl.work").exists()


def test_no_hub_is_told_at_once(manifest, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    data = manifest(2)
    for source in ("blip2", "llm"):
        said = fails("caption", data, "--source", source, "--force", "--workers", 0)
        assert "the hub cannot be reached" in said and "--model FOLDER" in said
    assert "the hub cannot be reached" in fails("maps", data)


def test_the_manifest_may_be_edited_meanwhile(world, manifest, monkeypatch):
    """Records that others add while maps are made, and their keys, stay."""
    data = manifest(2)
    share = captions.share

    def edits(*args, **more):
        captions.write_manifest(
            data, [records(data)[1], records(data)[0] | {"mine": 1}, {"video": "new.mp4"}]
        )
        return share(*args, **more)

    monkeypatch.setattr(captions, "share", edits)
    run("maps", data, *map_flags(world))
    one, two, new = records(data)
    assert "maps" in one and "maps" in two and two["mine"] == 1 and new == {"video": "new.mp4"}
    for record in dataset.read_manifest(data)[:2]:
        dataset.read_map(record["map_path"], record["captions"])


def test_names_that_are_no_utf8(tmp_path, clip_file):
    (tmp_path / "v").mkdir()
    name = (
        os.fsencode(tmp_path / "v") + b"/caf\xe9 \xe2\x80\xa8x.mp4"
    )  # Latin-1, and a Unicode line separator
    try:
        os.link(clip_file, name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    run("index", tmp_path / "v", "--out", tmp_path / "n.jsonl")
    run("caption", tmp_path / "n.jsonl", "--source", "label")
    (record,) = dataset.read_manifest(tmp_path / "n.jsonl")
    assert os.fsencode(record["path"]) == name and dataset.probe_video(record["path"]).frames == 50
