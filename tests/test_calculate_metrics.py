"""The command calculate_metrics.py: results, records, processes, and messages about bad input."""

import pickle
import re

import numpy as np
import pytest
from conftest import DIGITS, fails_with, make_dataset, npy, random_images, run_cli, torchrun
from measuring import PIXELS, records_in, records_of, sha256, tool, values_of

import calculate_metrics
from dataset_tool import main as dataset_tool
from generate_images import main as generate
from training.metrics import load_stats, save_stats
from training.metrics.detectors import PixelDetector
from training.metrics.evaluation import Evaluation


def test_script_offers_the_published_functions(capsys):
    for r in calculate_metrics.calculate_stats_for_files(image_path=DIGITS, metrics=["fd_pixels"], num_workers=0):
        assert r.images is not None
    # A reference is a plain dictionary, too.
    ref = {"fd_pixels": {"mu": r.stats.fd_pixels.mu + 1, "sigma": r.stats.fd_pixels.sigma}}
    values = calculate_metrics.calculate_metrics_from_stats(r.stats, ref, ["fd_pixels"], verbose=True)
    assert values["fd_pixels"] == pytest.approx(192)
    assert re.fullmatch(r"fd_pixels: +192\n", capsys.readouterr().out)


def test_calc(digits_ref, tmp_path):
    options = [f"--images={DIGITS}", f"--ref={digits_ref}", "--workers=0", "--metrics=fd_pixels,prdc_pixels"]
    result = tool("calc", *options, "--num=1797", "--error-bars", f"--outdir={tmp_path / 'results'}")
    values = values_of(result.output)
    assert values["fd_pixels"] == pytest.approx(0, abs=1e-6) and values["precision_pixels"] == 1
    assert values["fd_pixels_std"] > 0 and "Note" not in result.output
    (record,) = records_in(tmp_path / "results" / "metric-fd_pixels.jsonl")
    assert record in records_of(result.output)
    assert record["results"]["fd_pixels_std"] == pytest.approx(values["fd_pixels_std"], rel=1e-5)
    assert (record["metric"], record["num_images"], record["seed"]) == ("fd_pixels", 1797, 0)
    assert (record["images"], record["ref"]) == (str(DIGITS), str(digits_ref))
    assert record["ref_sha256"] == sha256(digits_ref)
    assert (record["detector"], record["resize"], record["resolution"]) == ("pixels", "average, 8x8", 8)
    assert record["ref_detector"] == {"detector": "pixels", "resize": "average, 8x8", "weights": None}
    assert record["ref_statistics"] == "stored" and "forced" not in record
    assert {"date", "code_version", "images_hash"} <= record.keys()
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_what_was_found(tmp_path):
    """Both commands print how they understood the images, and keep it with their results."""
    files = {**random_images(12), ".thumbs/a.png": b"", "b.cr2": b"", "c.txt": b""}
    images, ref = make_dataset(tmp_path / "images", files), tmp_path / "ref.safetensors"
    found = [
        f"{images}: 12 images (12 .png), pixels of 8x8 with 3 channels",
        "labels: not used",
        "left out: 1 hidden image (1 .thumbs)",
    ]
    common = ["--metrics=fd_pixels", "--workers=0"]
    result = tool("ref", f"--data={images}", f"--dest={ref}", *common)
    assert "\n".join(found) in result.output
    assert load_stats(ref).facts["data_found"][:3] == found
    result = tool("calc", f"--images={images}", f"--ref={ref}", "--num=12", *common)
    assert "\n".join(found) in result.output
    (record,) = records_of(result.output)
    assert record["images_found"][:3] == found and len(record["images_found"]) == 5
    result = tool("calc", f"--images={images}", f"--ref={ref}", "--num=5", *common)
    assert f"{images}: 5 of 12 images (12 .png)" in result.output
    np.savez(tmp_path / "adm.npz", np.zeros([3, 8, 8, 3], np.uint8))
    result = tool("calc", f"--images={tmp_path / 'adm.npz'}", f"--ref={ref}", "--num=3", *common)
    assert "adm.npz: 3 images, pixels of 8x8; labels: none" in result.output


def test_reference_over_its_images(tmp_path):
    np.savez(tmp_path / "adm.npz", np.zeros([3, 8, 8, 3], np.uint8))
    before = (tmp_path / "adm.npz").read_bytes()
    result = tool("ref", f"--data={tmp_path / 'adm.npz'}", f"--dest={tmp_path / 'adm.npz'}", ok=False)
    fails_with(result, "--dest=", "is the same as --data=")
    assert (tmp_path / "adm.npz").read_bytes() == before


def test_repeated_calc(digits_ref):
    options = [f"--images={DIGITS}", f"--ref={digits_ref}", "--metrics=fd_pixels", "--workers=0"]
    result = tool("calc", *options, "--num=900", "--repeat=3")
    values = [record["results"]["fd_pixels"] for record in records_of(result.output)]
    assert len(set(values)) == 3 and [record["seed"] for record in records_of(result.output)] == [0, 1, 2]
    line = next(line for line in result.output.splitlines() if line.startswith("fd_pixels"))
    assert f"mean {np.mean(values):.6g}, minimum {min(values):.6g}" in line
    fails_with(tool("calc", *options, "--num=1797", "--repeat=2", ok=False), "--repeat=2 needs more than --num=1797")


def test_note_of_a_small_reference(tmp_path):
    images = make_dataset(tmp_path / "images", random_images(40))
    ref = tmp_path / "ref.npz"
    caution = "Note: fd_pixels against a reference of 40 images in 192 dimensions mostly reflects the small sample"
    made = tool("ref", f"--data={images}", f"--dest={ref}", "--metrics=fd_pixels,prdc_pixels", "--workers=0")
    assert made.output.count("Note") == made.output.count(caution) == 1
    common = ["calc", f"--images={DIGITS}", "--num=200", "--metrics=fd_pixels,prdc_pixels", "--workers=0"]
    result = tool(*common, f"--ref={ref}")
    assert result.output.count("Note") == result.output.count(caution) == 1 and "Warning" not in result.output


def test_each_run_is_kept_at_once(digits_ref, tmp_path, monkeypatch):
    original, runs = Evaluation.__call__, []

    def interrupted(*args, **kwargs):
        runs.append(1)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(Evaluation, "__call__", interrupted)
    options = [f"--images={DIGITS}", f"--ref={digits_ref}", "--metrics=fd_pixels", "--workers=0", "--num=50"]
    tool("calc", *options, "--repeat=3", f"--outdir={tmp_path}", ok=False)
    assert [record["seed"] for record in records_in(tmp_path / "metric-fd_pixels.jsonl")] == [0]


def test_gen(snapshot_file, digits_ref, tmp_path):
    options = [f"--net={snapshot_file}", "--steps=3", "--S_churn=1"]
    measuring = [f"--ref={digits_ref}", "--metrics=fd_pixels", "--num=20"]
    result = tool("gen", *options, *measuring, "--seed=5", "--batch=7", f"--save-images={tmp_path / 'saved'}")
    (record,) = records_of(result.output)
    assert record["net_sha256"] == sha256(snapshot_file) and record["seeds"] == "5-24"
    assert record["labels"] == "drawn from the seed" and record["precision"] == "fp32"
    sampler = record["sampler"]
    assert sampler["solver"] == "heun" and sampler["num_steps"] == 3 and sampler["S_churn"] == 1
    # The same as with saved images.
    run_cli(generate, *options, "--seeds=5-24", f"--outdir={tmp_path / 'images'}")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").rglob("*.png")}
    assert saved == {path.name: path.read_bytes() for path in (tmp_path / "images").glob("*.png")}
    note = "fd_pixels of 20 images in 192 dimensions mostly reflects the small sample: use far more"
    assert record["note"] == note and result.output.count(f"Note: {note}") == 1 and "Warning" not in result.output
    calc = tool("calc", f"--images={tmp_path / 'images'}", *measuring, "--workers=0")
    assert values_of(calc.output) == values_of(result.output)


def test_gen_with_guidance_and_repeats(snapshot_file, digits_ref):
    options = [f"--net={snapshot_file}", f"--ref={digits_ref}", "--metrics=fd_pixels", "--num=10", "--steps=2"]
    guided = [f"--gnet={snapshot_file}", "--guidance=2", "--sampler=dpmpp-2m", "--guidance-interval=0.1,1", "--class=3"]
    result = tool("gen", *options, *guided, "--repeat=2")
    records = records_of(result.output)
    assert [record["seeds"] for record in records] == ["0-9", "10-19"]
    assert records[0]["gnet_sha256"] == sha256(snapshot_file) and records[0]["labels"] == "class 3"
    assert records[0]["sampler"]["solver"] == "dpmpp-2m" and "S_churn" not in records[0]["sampler"]
    assert records[0]["sampler"]["guidance"] == 2 and records[0]["sampler"]["guidance_interval"] == [0.1, 1]
    # Without guidance, the guide is not part of what was measured.
    for given in (f"--gnet={snapshot_file}", "--guidance-interval=0.1,1"):
        result = tool("gen", *options, given)
        assert f"Note: {given.split('=')[0]} has no effect without --guidance" in result.output
        (record,) = records_of(result.output)
        assert "gnet" not in record and "guidance_interval" not in record["sampler"]


def test_records_are_plain_json(snapshot_file, digits_ref, tmp_path):
    options = [f"--net={snapshot_file}", f"--ref={digits_ref}", "--metrics=fd_pixels", "--num=4", "--steps=2"]
    unlimited = ["--S_churn=1", f"--gnet={snapshot_file}", "--guidance=2", "--guidance-interval=0.1,inf"]
    tool("gen", *options, *unlimited, f"--outdir={tmp_path}")
    assert "Infinity" not in (tmp_path / "metric-fd_pixels.jsonl").read_text()
    (record,) = records_in(tmp_path / "metric-fd_pixels.jsonl")
    assert record["sampler"]["guidance_interval"] == [0.1, None] and "S_max" not in record["sampler"]


def test_seeds_that_would_repeat_images(snapshot_file, digits_ref):
    """Case 18: beyond 2^32 they are those of smaller seeds."""
    options = [f"--net={snapshot_file}", f"--ref={digits_ref}", "--metrics=fd_pixels", "--num=8", "--repeat=2"]
    fails_with(tool("gen", *options, "--seed=4294967292", ok=False), "seed 4294967307 is too large")


def test_two_processes_give_the_same(snapshot_file, digits_ref, tmp_path):
    common = [f"--ref={digits_ref}", "--error-bars"]
    commands = {
        "calc": [
            f"--images={DIGITS}",
            f"--metrics={','.join(PIXELS)}",
            "--num-images=1501",
            "--batch=100",
            "--workers=0",
        ],
        "gen": [f"--net={snapshot_file}", "--metrics=fd_pixels", "--num-images=101", "--steps=1", "--batch=10"],
    }
    for command, options in commands.items():
        tool(command, *common, *options, f"--outdir={tmp_path / '1'}")
        done = torchrun(2, "calculate_metrics.py", command, *common, *options, f"--outdir={tmp_path / '2'}")
        assert done.returncode == 0, done.stderr
    for metric in PIXELS:
        for pair in zip(*(records_in(tmp_path / n / f"metric-{metric}.jsonl") for n in "12"), strict=True):
            one, two = (record["results"] for record in pair)
            assert one.keys() == two.keys()
            for name in one:
                assert one[name] == pytest.approx(two[name], rel=1e-6), (metric, name)


def test_one_image_for_two_processes(snapshot_file, digits_ref):
    options = [f"--net={snapshot_file}", f"--ref={digits_ref}", "--metrics=fd_pixels", "--steps=1", "--num-images=2"]
    done = torchrun(3, "calculate_metrics.py", "gen", *options)
    assert done.returncode == 0, done.stderr
    assert values_of(done.stdout)["fd_pixels"] > 0


def test_references_of_other_tools(inception_file, tmp_path, monkeypatch):
    """The published pickles, .npz of mu and sigma, and reference batches of ADM.

    The Frechet distance, which takes seconds for 2048 features, is that of equal covariances.
    """

    def quick_distance(mu1, sigma1, mu2, sigma2):
        np.testing.assert_allclose(sigma1, sigma2, rtol=0, atol=1e-6)
        return float(np.square(mu1 - mu2).sum())

    monkeypatch.setattr("training.metrics.values.frechet_distance", quick_distance)
    images = np.random.default_rng(0).integers(0, 256, [12, 20, 20, 3], dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", images)
    weights = f"--detector-weights=inception={inception_file}"
    tool("ref", f"--data={tmp_path / 'adm.npz'}", f"--dest={tmp_path / 'fid.pkl'}", "--metrics=fid", weights)
    stats = load_stats(tmp_path / "fid.pkl")
    np.savez(tmp_path / "fid.npz", mu=stats.fid.mu, sigma=stats.fid.sigma)
    np.savez(tmp_path / "both.npz", arr_0=images, mu=stats.fid.mu, sigma=stats.fid.sigma)
    common = ["calc", f"--images={tmp_path / 'adm.npz'}", "--num=12", weights]
    for name in ("fid.pkl", "fid.npz", "both.npz", "adm.npz"):
        result = tool(*common, "--metrics=fid", f"--ref={tmp_path / name}")
        assert values_of(result.output)["fid"] == pytest.approx(0, abs=1e-4)
    result = tool(*common, "--metrics=fd_pixels,prdc", f"--ref={tmp_path / 'both.npz'}")
    assert values_of(result.output)["recall"] == 1
    assert {record["metric"]: record["weights"] for record in records_of(result.output)} == {
        "fd_pixels": None,
        "prdc": sha256(inception_file),
    }
    # FID is by the statistics that the file holds, whatever else is asked for.
    np.savez(tmp_path / "other.npz", arr_0=images, mu=stats.fid.mu + 1, sigma=stats.fid.sigma)
    for metrics in ("fid", "fid,prdc"):
        result = tool(*common, f"--metrics={metrics}", f"--ref={tmp_path / 'other.npz'}")
        assert values_of(result.output)["fid"] == pytest.approx(2048, rel=1e-4)
    how = {record["metric"]: record["ref_statistics"] for record in records_of(result.output)}
    assert how == {"fid": "stored", "prdc": "computed from its images"}
    assert "fid of 12 images in 2048" in result.output  # and nothing of the reference, whose number is not known
    # The inception score takes no reference.
    result = tool(*common, "--metrics=is", f"--ref={tmp_path / 'adm.npz'}")
    assert "ref" not in records_of(result.output)[0]


def test_bad_images(digits_ref, tmp_path):
    common = [f"--ref={digits_ref}", "--metrics=fd_pixels", "--workers=0"]

    def calc(path, *options):
        return tool("calc", f"--images={path}", *common, *options, ok=False)

    fails_with(calc(tmp_path / "nowhere"), "nowhere: no such dataset")
    (tmp_path / "empty").mkdir()
    fails_with(calc(tmp_path / "empty"), "no images found")
    fails_with(calc(DIGITS), "digits.zip: holds 1797 images, fewer than --num=50000")
    mixed = {**random_images(2), **{f"b{name}": data for name, data in random_images(2, size=9).items()}}
    fails_with(calc(make_dataset(tmp_path / "mixed", mixed), "--num=4"), "9x9", "all images must be alike")
    latents = make_dataset(tmp_path / "latents", {"a.npy": npy(np.ones([8, 2, 2], np.float32))})
    fails_with(calc(latents, "--num=2"), "holds latents, not images")
    five = make_dataset(tmp_path / "five", {f"{i}.npy": npy(np.zeros([5, 8, 8], np.uint8)) for i in range(2)})
    fails_with(calc(five, "--num=2"), "detectors take RGB or grayscale images")
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    fails_with(calc(tmp_path / "a.npz"), "a.npz: holds no images (it has no arr_0)")
    np.savez(tmp_path / "b.npz", np.zeros([3, 4]))
    fails_with(calc(tmp_path / "b.npz"), "arr_0 is float64 [3, 4]")
    (tmp_path / "c.npz").write_bytes(b"PK\3\4")
    fails_with(calc(tmp_path / "c.npz"), "c.npz: holds no images")
    other = make_dataset(tmp_path / "other", random_images(3, size=16))
    fails_with(calc(other, "--num=3"), "the images are 16x16, those of the reference 8x8", "--force")
    (record,) = records_of(calc(other, "--num=3", "--force").output)
    assert record["forced"] == ["the images are 16x16, those of the reference 8x8"] and record["resolution"] == 16
    np.savez(tmp_path / "d.npz", np.zeros([3, 4, 5, 3], np.uint8))
    fails_with(calc(tmp_path / "d.npz", "--num=3"), "d.npz: images of 4x5, which are not square")


def test_bad_references(digits_ref, dinov2_folder, tmp_path):
    images = make_dataset(tmp_path / "images", random_images(5))
    weights = f"--detector-weights=dinov2={dinov2_folder}"
    ref = tmp_path / "ref.safetensors"
    tool("ref", f"--data={images}", f"--dest={ref}", "--metrics=fd_dinov2", "--resize=pil", "--workers=0", weights)
    common = ["calc", f"--images={images}", "--num=5", "--workers=0", weights]
    result = tool(*common, f"--ref={ref}", "--metrics=fd_dinov2", ok=False)
    fails_with(result, "was made with resize 'pil bicubic, 224x224'", "--force")
    assert tool(*common, f"--ref={ref}", "--metrics=fd_dinov2", "--force").exit_code == 0
    fails_with(
        tool(*common, f"--ref={ref}", "--metrics=kd_dinov2", ok=False),
        "no features for kd_dinov2",
        "calculate_metrics.py ref --metrics=kd_dinov2",
    )
    fails_with(tool(*common, f"--ref={tmp_path / 'nowhere.pkl'}", ok=False), "nowhere.pkl: no such file")
    (tmp_path / "empty").mkdir()
    fails_with(tool(*common, f"--ref={tmp_path / 'empty'}", ok=False), f"{tmp_path / 'empty'}: no images found")
    np.savez(tmp_path / "cut.npz", arr_0=np.zeros([3, 8, 8, 3], np.uint8))
    data = bytearray((tmp_path / "cut.npz").read_bytes())
    data[data.index(b"PK\1\2")] ^= 0xFF
    (tmp_path / "cut.npz").write_bytes(data)
    fails_with(tool(*common, f"--ref={tmp_path / 'cut.npz'}", "--metrics=fid", ok=False), "cut.npz: cannot be read")
    (tmp_path / "odd.pkl").write_bytes(b"odd")
    (tmp_path / "network.pkl").write_bytes(pickle.dumps({"ema": 1}))
    (tmp_path / "empty.pkl").touch()
    (tmp_path / "image.png").write_bytes(next(iter(random_images(1).values())))
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    nothing = "holds no statistics of features: give a file of calculate_metrics.py ref, a published pickle, or an .npz"
    other = dict.fromkeys(["odd.pkl", "network.pkl", "image.png", "other.npz"], nothing)
    for name, fragment in {**other, "empty.pkl": "the file is empty"}.items():
        fails_with(tool(*common, f"--ref={tmp_path / name}", "--metrics=fid", ok=False), f"{name}: {fragment}")


def test_incomparable_images_are_refused_before_generating(snapshot_file, digits_ref, tmp_path, monkeypatch):
    def too_late(*_args, **_kwargs):
        pytest.fail("has begun to generate")

    small = tmp_path / "small.safetensors"
    images = make_dataset(tmp_path / "images", random_images(4))
    tool("ref", f"--data={images}", f"--dest={small}", f"--metrics={','.join(PIXELS)}", "--workers=0")
    large = make_dataset(tmp_path / "large", random_images(3, size=16))
    tool("ref", f"--data={large}", f"--dest={tmp_path / 'large.npz'}", "--metrics=fd_pixels", "--workers=0")
    narrow = {"fd_pixels": {"mu": np.zeros(3), "sigma": np.eye(3)}}
    save_stats(tmp_path / "narrow.npz", narrow)
    monkeypatch.setattr("training.generation.StackedRandomGenerator", too_late)

    def gen(ref, *options):
        return tool("gen", f"--net={snapshot_file}", f"--ref={ref}", *options, ok=False)

    fails_with(gen(small, "--metrics=kd_pixels", "--num=1001"), "kd_pixels needs a reference of 1001 or more images")
    fails_with(gen(digits_ref, "--metrics=kd_pixels", "--num=1000"), "kd_pixels needs 1001 or more images, not 1000")
    fails_with(gen(small, "--metrics=prdc_pixels", "--num=9"), "needs a reference of 6 or more images, not 4")
    fails_with(gen(digits_ref, "--metrics=prdc_pixels", "--num=3"), "prdc_pixels needs 4 or more images, not 3")
    bars = ["--metrics=fd_pixels", "--num=29", "--error-bars"]
    fails_with(gen(digits_ref, *bars), "an error bar of fd_pixels needs 30 or more images, not 29")
    fails_with(gen(tmp_path / "large.npz", "--metrics=fd_pixels", "--num=9"), "8x8, those of the reference 16x16")
    fails_with(gen(tmp_path / "narrow.npz", "--metrics=fd_pixels", "--num=9"), "has 3 features, the images have 192")


def test_impossible_destinations_are_refused_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(PixelDetector, "__call__", lambda *_: pytest.fail("has begun"))
    (tmp_path / "file").touch()

    def ref(dest):
        return tool("ref", f"--data={DIGITS}", f"--dest={dest}", "--metrics=kd_pixels", "--workers=0", ok=False)

    fails_with(ref(tmp_path / "a.pkl"), "the published layout holds means and covariances only")
    fails_with(ref(tmp_path / "file" / "a.npz"), "File exists", str(tmp_path / "file"), exit_code=1)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--metrics=FID"], "no such metric: 'FID'; did you mean fid?"),
        (["--metrics="], "no such metric: ''"),
        (["--num=1"], "--num"),
        (["--detector-weights=vgg=x"], "'vgg=x' is not NAME=PATH with a NAME of inception, dinov2, clip, pixels"),
        (["--detector-weights=pixels=x"], "the detector pixels has no weights"),
        (["--detector-weights=inception=x"], "--detector-weights=inception: no metric of --metrics uses it"),
        (["--resize=pil"], "--resize=pil: no metric of --metrics uses DINOv2 or CLIP"),
        (["--held-out=x"], "--held-out: no metric of --metrics uses it"),
        (["--metrics=ct_pixels"], "ct_pixels needs images that training has not seen: calculate_metrics.py --held-out"),
    ],
)
def test_bad_options(options, fragment, digits_ref):
    common = [f"--images={DIGITS}", "--num=100", f"--ref={digits_ref}", "--metrics=fd_pixels", "--workers=0"]
    fails_with(tool("calc", *common, *options, ok=False), fragment)


def test_bad_networks(snapshot_file, digits_ref):
    common = ["gen", "--metrics=fd_pixels", "--num=4", "--steps=1"]
    fails_with(tool(*common, f"--net={snapshot_file}", ok=False), "which reference? Give --ref")
    fails_with(tool(*common, f"--ref={digits_ref}", ok=False), "which network? Give --net or --preset")
    fails_with(tool(*common, f"--ref={digits_ref}", "--net=nowhere.pkl", ok=False), "nowhere.pkl: no such file")


def test_weights_that_are_missing_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    images = make_dataset(tmp_path / "images", random_images(3))
    result = tool("ref", f"--data={images}", f"--dest={tmp_path / 'r.npz'}", "--metrics=fid", "--offline", ok=False)
    fails_with(result, "weights-inception-2015-12-05-6726825d.pth", "python snapshot_tool.py prefetch fid")


def test_nothing_half_written(tmp_path, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(PixelDetector, "__call__", interrupted)
    dest = tmp_path / "a.safetensors"
    result = tool("ref", f"--data={DIGITS}", f"--dest={dest}", "--metrics=fd_pixels", "--workers=0", ok=False)
    assert result.exit_code == 130 and "Interrupted: repeat the command to start over" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_table_comes_first_and_records_only_where_asked(digits_ref):
    args = ["calc", f"--images={DIGITS}", f"--ref={digits_ref}", "--metrics=fd_pixels", "--workers=0", "--num=50"]
    plain = run_cli(calculate_metrics.main, *args).output
    assert records_of(plain) == [] and values_of(plain)["fd_pixels"] > 0
    lines = run_cli(calculate_metrics.main, *args, "--json").output.splitlines()
    assert [line[0] for line in lines[-2:]] == ["N", "{"] and lines[-3].startswith("fd_pixels")


def test_folders_of_photos_of_all_sizes(tmp_path):
    """One against another, and as a reference: the same as when they are converted first."""
    folders = {}
    for name, seed in [("mine", 0), ("theirs", 1)]:
        files = {}
        for i in range(4):
            channels = None if i == 3 else 3  # a gray one among the rest
            files |= {f"{i}.png": next(iter(random_images(1, 16 + 3 * i, channels, seed=seed + i).values()))}
        folders[name] = make_dataset(tmp_path / name, files)
    common = ["--metrics=fd_pixels", "--workers=0"]
    images, ref = f"--images={folders['mine']}", f"--ref={folders['theirs']}"
    fails_with(
        tool("calc", images, ref, *common, "--num=4", ok=False), "all images must be alike", "--resolution=32x32"
    )
    fit = ["--resolution=8", "--transform=center-crop"]
    direct = tool("calc", images, ref, *common, *fit, "--num=4")
    (record,) = records_of(direct.output)
    assert record["transform"] == "center-crop to 8x8" and "ref_sha256" not in record and "ref_hash" in record
    tool("ref", f"--data={folders['theirs']}", f"--dest={tmp_path / 'ref.npz'}", *common, *fit)
    by_statistics = tool("calc", images, f"--ref={tmp_path / 'ref.npz'}", *common, *fit, "--num=4")
    for name, folder in folders.items():
        args = [f"--source={folder}", f"--dest={tmp_path / f'{name}.zip'}", *fit, "--workers=1"]
        assert run_cli(dataset_tool, "convert", *args).exit_code == 0
    converted = [f"--images={tmp_path / 'mine.zip'}", f"--ref={tmp_path / 'theirs.zip'}"]
    values = [values_of(r.output) for r in (direct, by_statistics, tool("calc", *converted, *common, "--num=4"))]
    assert values[0] == values[1] == values[2]
    fails_with(tool("calc", images, ref, "--transform=center-crop", ok=False), "needs --resolution")


def test_data_are_looked_at_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("training.metrics.weights.open_url", lambda *_args, **_kwargs: pytest.fail("has fetched"))
    nowhere = tmp_path / "nowhere"
    fails_with(tool("ref", f"--data={nowhere}", f"--dest={tmp_path / 'a' / 'b.npz'}", ok=False), "no such dataset")
    fails_with(tool("calc", f"--images={nowhere}", f"--ref={tmp_path}", ok=False), "no such dataset")
    assert list(tmp_path.iterdir()) == []
