"""Captions, contexts and prompts, from a table of captions to pictures."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import DIGITS, fails_with, make_dataset, npy, random_images, run_cli, tiny_network, tiny_uvit
from measuring import records_of, tool

from calculate_likelihood import main as calculate_likelihood
from dataset_tool import main as dataset_tool
from dnnlib.errors import UserError
from generate_images import main as generate
from train_uvit import main as train
from training.conditioning import Conditioning
from training.config.generation import GenerationConfig
from training.conversion.captions import add_captions
from training.dataset.captions import read_contexts
from training.dataset.images import ImageFolderDataset
from training.dataset.order import RunSampler
from training.encoders import StandardRGBEncoder, TextEncoder, WordEncoder, text_encoder_from_record, text_record
from training.prompts import prompts_for
from training.provenance import read_png_text
from training.snapshot import Snapshot, load_network, save_network

WORDS = "zero,one,two,three,four,five,six,seven,eight,nine"


def pixels_of(path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


def captions(source, dest, *options):
    return run_cli(dataset_tool, "captions", f"--source={source}", f"--dest={dest}", "--text-encoder=words", *options)


def test_words_have_vectors():
    encoder = WordEncoder(4, 16)
    contexts = encoder.encode(["a seven", "A  Seven!", "", "one two three four five"])
    assert contexts.shape == (4, 4, 16) and contexts.dtype == torch.float32
    assert torch.equal(contexts[0], contexts[1])
    assert torch.equal(contexts[0, 2], contexts[2, 0])  # padding
    assert not torch.allclose(contexts[3], contexts[0]) and contexts.std().item() == pytest.approx(1, abs=0.2)
    assert torch.equal(WordEncoder(4, 16).encode(["seven"])[0, 0], contexts[0, 1])


@pytest.fixture
def clip_folder(tmp_path):
    """A text model of CLIP of random numbers."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "clip"
    folder.mkdir()
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(vocab_size=54, projection_dim=16, max_position_embeddings=10, **sizes, **ends)
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_text_models_of_clip(clip_folder):
    encoder = TextEncoder(str(clip_folder), tokens=10)
    contexts = encoder.encode(["a cat", "", "a very long text indeed"])
    assert contexts.shape == (3, 10, 16)
    assert torch.equal(contexts[1:2], encoder.encode([""]))
    assert not torch.allclose(contexts[0, 1], contexts[1, 1])
    torch.testing.assert_close(contexts[0, 0], contexts[1, 0])  # a token does not see those behind it
    again = text_encoder_from_record("x", text_record(encoder))
    assert torch.equal(again.encode(["a cat"])[0], contexts[0])
    with pytest.raises(UserError, match="is 16 wide, not 8"):
        TextEncoder(str(clip_folder), tokens=10, width=8)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "is none of TextEncoder, WordEncoder"),
        ({"name": "os.system", "kwargs": {}}, "is none of"),
        ({"name": "WordEncoder", "kwargs": {"tokens": 10**9}}, "tokens must be at most"),
        ({"name": "WordEncoder", "kwargs": {"model": "x"}}, "do not fit"),
        ({"name": "WordEncoder", "kwargs": []}, "where a dictionary of options belongs"),
        ({"name": "TextEncoder", "kwargs": {"model": "somebody/else"}}, "that x names could not be loaded"),
    ],
)
def test_text_encoders_that_a_file_cannot_name(record, message):
    if record and record["name"] == "TextEncoder":
        pytest.importorskip("transformers")
    with pytest.raises(UserError, match=message):
        text_encoder_from_record("x", record)


def test_captions_of_classes(tmp_path):
    result = captions(DIGITS, tmp_path / "text.zip", "--template=a {}", f"--class-names={WORDS}")
    assert result.exit_code == 0, result.output
    dataset = ImageFolderDataset(tmp_path / "text.zip", use_captions=True)
    plain = ImageFolderDataset(DIGITS)
    assert len(dataset) == len(plain) and dataset.label_dim == 0
    for i in (0, 700):
        image, context = dataset[i]
        assert np.array_equal(image, plain[i][0])
        text = f"a {WORDS.split(',')[plain.get_stored_label(i)]}"
        assert dataset.captions.texts[i] == (text,)
        assert np.array_equal(context, WordEncoder().encode([text])[0])
    assert np.array_equal(dataset.captions.empty, WordEncoder().encode([""])[0])
    # Without captions it is the same dataset as before.
    again = ImageFolderDataset(tmp_path / "text.zip")
    assert again.get_stored_label(5) == plain.get_stored_label(5) and again.notes == plain.notes
    assert any("1797 captions, contexts of 8 tokens of width 32" in line for line in dataset.summary())


IMAGES = {"a/x.png": 0, "b/y.png": 1}
COCO = {
    "images": [{"id": 7, "file_name": "x.jpg"}, {"id": 9, "file_name": "y.jpg"}],
    "annotations": [{"image_id": i, "caption": text} for i, text in [(7, "one"), (9, "two"), (7, "three")]],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", json.dumps(COCO)),
        ("c.csv", 'filename,caption\nx.jpg,one\ny.png,two\na/x.png,"three"\n'),
        ("c.tsv", "caption\tfilename\none\tx\ntwo\ty\nthree\tx\n"),
        ("c.txt", "one\ntwo\n"),
        (None, None),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "data.zip"])
def test_sources_of_captions(tmp_path, name, text, kind):
    files = dict(zip(IMAGES, random_images(2).values(), strict=True))
    if name is None:
        files |= {"a/x.txt": b"one\n\nthree\n", "b/y.txt": b"two"}
    source = make_dataset(tmp_path / kind, files)
    options = []
    if name is not None:
        (tmp_path / name).write_text(text)
        options = [f"--captions={tmp_path / name}"]
    result = captions(source, tmp_path / "out.zip", *options)
    assert result.exit_code == 0, result.output
    dataset = ImageFolderDataset(tmp_path / "out.zip", use_captions=True)
    first = ("one",) if name == "c.txt" else ("one", "three")
    assert dataset.captions.texts == [first, ("two",)]
    # A visit shows one caption, the next visit the next.
    visits = [dataset.get_label(0, visit) for visit in range(4)]
    contexts = WordEncoder().encode(first).numpy()
    assert all(np.array_equal(visit, contexts[i % len(contexts)]) for i, visit in enumerate(visits))
    batch = dataset.__getitems__([0, 2, 1])
    assert np.array_equal(batch[1][0], batch[0][0]) and np.array_equal(batch[1][1], visits[1])


def test_captions_of_images_that_were_converted(tmp_path):
    source = make_dataset(
        tmp_path / "images", dict(zip(["b/y.png", "a/x.png"], random_images(2).values(), strict=True))
    )
    result = run_cli(
        dataset_tool, "convert", f"--source={source}", f"--dest={tmp_path / 'd.zip'}", "--keep-names", "--workers=1"
    )
    assert result.exit_code == 0, result.output
    (tmp_path / "c.json").write_text(json.dumps(COCO))
    result = captions(tmp_path / "d.zip", tmp_path / "out.zip", f"--captions={tmp_path / 'c.json'}")
    assert result.exit_code == 0, result.output
    assert ImageFolderDataset(tmp_path / "out.zip", use_captions=True).captions.texts == [("one", "three"), ("two",)]
    assert ImageFolderDataset(tmp_path / "d.zip").notes == []


def test_visits_are_counted():
    sampler = RunSampler(5, 0, 0, 4, (0, 4), 4, visits=True)
    plain = RunSampler(5, 0, 0, 4, (0, 4), 4)
    seen = [next(batches) for batches in [iter(sampler)] for _ in range(5)]
    same = [next(batches) for batches in [iter(plain)] for _ in range(5)]
    assert [[i % 5 for i in batch] for batch in seen] == same
    assert [i // 5 for batch in seen for i in batch] == [k // 5 for k in range(20)]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, [], "x.txt: no such text file"),
        ({"a/x.txt": b"\n", "b/y.txt": b"two"}, [], "holds no caption"),
        ({"c.csv": b"filename,caption\nx,one\n"}, ["--captions=c.csv"], "no caption for 1 image, such as b/y.png"),
        ({"c.csv": b"a,b\nx,one\n"}, ["--captions=c.csv"], "neither annotations of MS-COCO nor a table"),
        ({"c.json": b"[]"}, ["--captions=c.json"], "neither annotations of MS-COCO nor a table"),
        ({"c.txt": b"one"}, ["--captions=c.txt"], "has 1 line for 2 images"),
        ({}, ["--captions=none.txt"], "--captions=none.txt: cannot be read"),
        ({}, ["--template=a {}", "--class-names=cat"], "has 2 classes: name them by --class-names"),
        ({}, ["--template=a", "--class-names=cat,dog"], "must hold {} once"),
        ({}, ["--template=a {}", "--captions=c.txt"], "exclude each other"),
    ],
)
def test_bad_captions(tmp_path, monkeypatch, files, options, message):
    monkeypatch.chdir(tmp_path)
    images = dict(zip(IMAGES, random_images(2).values(), strict=True))
    source = make_dataset(
        tmp_path / "data", images | {name: data for name, data in files.items() if "/" in name}, IMAGES
    )
    for name, data in files.items():
        if "/" not in name:
            (tmp_path / name).write_bytes(data)
    fails_with(captions(source, tmp_path / "out.zip", *options), message)
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros([1, 2, 3])), "not an array of contexts"),
        (npy(np.zeros([2, 3], np.float32)), "not an array of contexts"),
        (npy(np.full([1, 2, 3], np.nan, np.float32)), "not finite"),
        (npy(np.zeros([1, 5000, 1], np.float32)), "too large"),
        (b"junk", "."),
    ],
)
def test_hostile_contexts(data, message):
    with pytest.raises(ValueError, match=message):
        read_contexts(data)
    objects = np.empty([1], object)
    objects[0] = "x"
    with pytest.raises(ValueError, match="allow_pickle"):
        read_contexts(npy(objects))


def test_datasets_whose_captions_are_damaged(tmp_path):
    source = make_dataset(tmp_path / "data", random_images(2))
    with pytest.raises(UserError, match="has no captions: add them by dataset_tool.py captions"):
        ImageFolderDataset(source, use_captions=True)
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    assert captions(source, tmp_path / "out", f"--captions={tmp_path / 'c.txt'}").exit_code == 0
    name = next((tmp_path / "out" / "00000").glob("*0.contexts"))
    name.write_bytes(npy(np.zeros([3, 8, 32], np.float32)))
    with pytest.raises(UserError, match=r"holds \[3, 8, 32\] numbers, not \[1, 8, 32\]"):
        ImageFolderDataset(tmp_path / "out", use_captions=True)[0]
    name.unlink()
    with pytest.raises(UserError, match="is missing: make the captions again"):
        ImageFolderDataset(tmp_path / "out", use_captions=True)[0]


def test_from_captions_to_pictures(tmp_path):
    data = tmp_path / "text.zip"
    assert captions(DIGITS, data, "--template=a {}", f"--class-names={WORDS}").exit_code == 0
    small = ["--embed-dim=16", "--depth=3", "--num-heads=2", "--device=cpu", "--duration=128", "--batch=64"]
    run = ["--status=64", "--snapshot=1024", "--checkpoint=1024", "--preview=1024", "--preview-images=2"]
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--preset=digits-uvit-text", *small, *run)
    assert result.exit_code == 0, result.output
    path = next((tmp_path / "run").glob("*-ema.safetensors"))
    snapshot = load_network(path)
    assert snapshot.net.spec.conditioning == Conditioning(kind="tokens", size=32, tokens=8, optional=True)
    torch.testing.assert_close(snapshot.net.empty_context, WordEncoder().encode([""])[0])
    (tmp_path / "prompts.txt").write_text("a nine\n\n")
    out, common = tmp_path / "out", [f"--net={path}", "--steps=2", "--device=cpu"]
    prompts = ["--prompt=a two", "--prompt=a seven", f"--prompts={tmp_path / 'prompts.txt'}", "--guidance=2"]
    result = run_cli(generate, *common, f"--outdir={out}", "--seeds=0-4", *prompts)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "generation.json").read_text())
    assert record["prompts"] == ["a two", "a seven", "a nine"] and record["labels"] == "prompt seed modulo 3"
    texts = [read_png_text(out / f"{i:06d}.png")["prompt"] for i in range(5)]
    assert texts == ["a two", "a seven", "a nine", "a two", "a seven"]
    # An image depends on its seed and prompt alone.
    assert (
        run_cli(
            generate, *common, f"--outdir={tmp_path / 'one'}", "--seeds=4", "--prompt=a seven", "--guidance=2"
        ).exit_code
        == 0
    )
    pixels = [pixels_of(folder / "000004.png") for folder in (out, tmp_path / "one")]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    result = run_cli(generate, *common, f"--outdir={tmp_path / 'empty'}", "--seeds=0")
    assert "no --prompt is given: images follow the empty text" in result.output
    fails_with(run_cli(generate, *common, f"--outdir={tmp_path / 'c'}", "--class=3"), "--class=3 is out of range")
    fails_with(
        run_cli(generate, *common, f"--outdir={out}", "--prompts=none.txt"), "--prompts=none.txt: cannot be read"
    )
    result = run_cli(generate, *common, f"--outdir={out}", "--prompt=a b", "--prompt=c", "--print-config")
    assert "--prompt='a b' \\\n    --prompt=c" in result.output


@pytest.mark.parametrize(
    ("net", "metadata", "options", "message"),
    [
        (tiny_network, {}, ["--prompt=x"], "--prompt is for networks that follow texts"),
        (lambda: tiny_uvit(Conditioning()), {}, ["--prompt=x"], "follows nothing"),
        (tiny_network, {}, ["--text-encoder=x"], "--text-encoder has no effect without --prompt"),
        (lambda: tiny_uvit(Conditioning.of_text(8, 32)), {}, ["--prompt=x"], "does not say which text encoder"),
        (
            lambda: tiny_uvit(Conditioning.of_text(4, 32)),
            {"text_encoder": text_record(WordEncoder())},
            ["--prompt=x"],
            "the text encoder makes 8 tokens of width 32",
        ),
        (
            lambda: tiny_uvit(Conditioning.of_text(8, 32)),
            {"text_encoder": text_record(WordEncoder())},
            ["--prompt=x", "--text-encoder=y"],
            "are encoded by words, not by a model",
        ),
    ],
)
def test_prompts_that_a_network_does_not_take(tmp_path, net, metadata, options, message):
    path = tmp_path / "net.safetensors"
    save_network(path, net(), StandardRGBEncoder(), metadata)
    fails_with(run_cli(generate, f"--net={path}", f"--outdir={tmp_path / 'out'}", *options), message)


@pytest.fixture
def text_network(tmp_path):
    """The file of a network of two tokens of words."""
    metadata = {"text_encoder": text_record(WordEncoder(2, 4))}
    path = tmp_path / "net.safetensors"
    save_network(path, tiny_uvit(Conditioning.of_text(2, 4)), StandardRGBEncoder(), metadata)
    return path


def captioned(tmp_path, count: int = 6, encoder: WordEncoder | None = None):
    """A dataset whose images have two captions each, 'image 0 a', 'image 0 b', 'image 1 a', ..."""
    source = ImageFolderDataset(make_dataset(tmp_path / "plain", random_images(count)))
    dest = tmp_path / "captions.zip"
    add_captions(source, dest, [(f"image {i} a", f"image {i} b") for i in range(count)], encoder or WordEncoder(2, 4))
    return dest


TABLE = "filename,caption\n" + "".join(f"{i}.png,image {i} {x}\n" for i in range(6) for x in "ab")


@pytest.mark.parametrize("kind", ["dataset", "table"])
def test_prompts_of_a_set_of_captions(tmp_path, text_network, kind):
    """Each image of the set once, with one of its captions; the contexts are those that the text encoder makes."""
    source = captioned(tmp_path) if kind == "dataset" else tmp_path / "captions.csv"
    if kind == "table":
        source.write_text(TABLE)
    common = [f"--net={text_network}", "--steps=2", "--device=cpu"]
    result = run_cli(generate, *common, f"--prompts={source}", "--seeds=0-5", f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 0, result.output
    texts = [read_png_text(tmp_path / "out" / f"{i:06d}.png")["prompt"] for i in range(6)]
    assert sorted(text.split()[1] for text in texts) == [*"012345"] and {text.split()[2] for text in texts} == {*"ab"}
    assert [text.split()[1] for text in texts] != [*"012345"]
    (tmp_path / "lines.txt").write_text("\n".join(texts))
    lines = [f"--prompts={tmp_path / 'lines.txt'}", "--seeds=0-5", f"--outdir={tmp_path / 'same'}"]
    assert run_cli(generate, *common, *lines).exit_code == 0
    for i in range(6):
        out, same = (pixels_of(tmp_path / folder / f"{i:06d}.png") for folder in ("out", "same"))
        assert np.array_equal(out, same)


def test_measuring_on_a_set_of_captions(tmp_path, text_network):
    ref = tmp_path / "ref.safetensors"
    tool("ref", f"--data={DIGITS}", f"--dest={ref}", "--metrics=fd_pixels", "--workers=0")
    options = [f"--net={text_network}", f"--ref={ref}", "--metrics=fd_pixels", "--steps=2", "--num=8", "--guidance=2"]
    result = tool("gen", *options, f"--prompts={captioned(tmp_path)}", f"--save-images={tmp_path / 'images'}")
    (record,) = records_of(result.output)
    assert record["labels"] == "prompt seed modulo 6" and len(record["prompts"]) == 6
    texts = [read_png_text(tmp_path / "images" / "000000" / f"{i:06d}.png")["prompt"] for i in range(8)]
    assert texts == [*record["prompts"], *record["prompts"][:2]]


def test_likelihoods_given_captions(tmp_path, text_network):
    """Those of each image given its first caption; images without any, or of another encoder, are refused."""

    def bits(data, name):
        out = tmp_path / f"{name}.jsonl"
        options = [f"--net={text_network}", f"--data={data}", f"--out={out}", "--num=2", "--rtol=0.1", "--atol=0.1"]
        result = run_cli(calculate_likelihood, *options, "--device=cpu")
        if result.exit_code:
            return result
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        return [row["bits_per_dim"] for row in rows if "index" in row]

    source = ImageFolderDataset(make_dataset(tmp_path / "plain", random_images(6, channels=None)))
    for name, texts in [("one", ("a", "b")), ("same", ("a", "c")), ("other", ("c", "b"))]:
        add_captions(source, tmp_path / f"{name}.zip", [texts] * 6, WordEncoder(2, 4))
    one, same, other = (bits(tmp_path / f"{name}.zip", name) for name in ("one", "same", "other"))
    assert one == same and one != other and len(one) == 2
    fails_with(bits(tmp_path / "plain", "plain"), "has no captions: add them by dataset_tool.py captions")
    add_captions(source, tmp_path / "wide.zip", [("a",)] * 6, WordEncoder(2, 8))
    fails_with(bits(tmp_path / "wide.zip", "wide"), "its captions are 2 tokens of width 8, and --net", "of width 4")


def test_the_empty_text_of_a_set_of_captions(tmp_path):
    """A network whose file holds no empty text takes that of the set: guidance has an effect."""
    net = tiny_uvit(Conditioning.of_text(2, 4))
    assert not net.empty_context.any()
    config = GenerationConfig.from_flat({"net": "x", "prompts": str(captioned(tmp_path))})
    assert prompts_for(config, Snapshot(net, StandardRGBEncoder(), {}, "x"), torch.device("cpu")) is not None
    torch.testing.assert_close(net.empty_context, WordEncoder(2, 4).encode([""])[0])


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (WordEncoder(3, 4), [], "another text encoder"),
        (WordEncoder(2, 4), ["--prompt=x"], "its captions have their contexts already: leave out --prompt"),
        (WordEncoder(2, 4), ["--text-encoder=x"], "leave out --text-encoder"),
        (None, [], "has no captions: add them by dataset_tool.py captions"),
    ],
)
def test_sets_of_captions_that_do_not_fit(tmp_path, text_network, encoder, options, message):
    source = captioned(tmp_path, encoder=encoder) if encoder else make_dataset(tmp_path / "data", random_images(2))
    fails_with(
        run_cli(generate, f"--net={text_network}", f"--outdir={tmp_path / 'o'}", f"--prompts={source}", *options),
        message,
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,b\n", "--prompts=c.csv: neither annotations of MS-COCO nor a table"), ("filename,caption\n", "holds no text")],
)
def test_tables_without_prompts(tmp_path, monkeypatch, text_network, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.csv").write_text(text)
    fails_with(run_cli(generate, f"--net={text_network}", "--outdir=o", "--prompts=c.csv"), message)


@pytest.mark.parametrize("options", [["--cond=0"], []])
def test_training_needs_captions(tmp_path, options):
    result = run_cli(
        train, f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", "--preset=digits-uvit-text", *options, "-n"
    )
    fails_with(result, "--captions=1 contradicts --cond=0" if options else "has no captions")
