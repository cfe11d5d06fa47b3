"""Python names of the published release, used as its scripts use them."""

import numpy as np
import pytest
import torch
from conftest import DIGITS, TINY, images_in, random_images, run_cli

import calculate_metrics
import generate_images
import reconstruct_phema
import train_edm2
from dnnlib.errors import UserError
from training.snapshot import load_network


def test_presets_have_the_published_fields():
    preset = generate_images.config_presets["edm2-img512-s-guid-dino"]
    assert preset.net.endswith("edm2-img512-s-2147483-0.085.pkl") and preset.guidance == 1.9
    assert preset.gnet.endswith("edm2-img512-xs-uncond-2147483-0.085.pkl")
    assert "gnet" not in generate_images.config_presets["edm2-img64-s-fid"]
    assert train_edm2.config_presets["edm2-img512-xs"] == {
        "duration": 2048 << 20, "batch": 2048, "channels": 128, "lr": 0.012, "decay": 70000, "dropout": 0.0,
        "P_mean": -0.4, "P_std": 1.0,
    }  # fmt: skip


def test_images_by_paths(run, tmp_path):
    main, guide = (str(run / f"network-snapshot-0000003-{std}.safetensors") for std in ("0.100", "0.050"))
    options = dict(seeds=range(3), device="cpu", num_steps=4)
    made = generate_images.generate_images(net=main, gnet=guide, guidance=1.5, outdir=tmp_path / "a", **options)
    for batch in made:
        assert batch.images.dtype == torch.uint8
    nets = [load_network(path).net for path in (main, guide)]
    for _ in generate_images.generate_images(*nets, guidance=1.5, outdir=tmp_path / "b", **options):
        pass
    a, b = images_in(tmp_path / "a"), images_in(tmp_path / "b")
    assert len(a) == 3 and a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match="nowhere"):
        generate_images.generate_images(net="nowhere.pkl")


def test_sampler_and_random_numbers(run):
    net = load_network(run / "network-snapshot-0000003-0.100.safetensors").net
    rnd = generate_images.StackedRandomGenerator("cpu", [1, 2])
    noise = rnd.randn([2, net.img_channels, net.img_resolution, net.img_resolution])
    labels = torch.eye(net.label_dim)[rnd.randint(net.label_dim, size=[2])]
    images = generate_images.edm_sampler(net, noise, labels, gnet=net, num_steps=3, randn_like=rnd.randn_like)
    assert images.shape == noise.shape and images.isfinite().all()


def test_reconstruction(run, tmp_path):
    pickles = reconstruct_phema.list_input_pickles(run, in_prefix=None, in_std=[0.05, 0.10])
    assert {round(p.std, 3) for p in pickles} == {0.05, 0.1} and all(p.path.is_file() for p in pickles)
    out_nimg = max(p.nimg for p in pickles)
    made = [*reconstruct_phema.reconstruct_phema(pickles, [0.07], out_nimg=out_nimg, out_dir=tmp_path, verbose=False)]
    expected = reconstruct_phema.pkl_path(str(tmp_path), "phema", out_nimg, 0.07).replace(".pkl", ".safetensors")
    assert [str(path) for path in made] == [expected] and made[0].is_file()


def test_snapshots_of_any_name_are_inputs_but_no_reconstructions(run, tmp_path):
    for path in run.glob("network-snapshot-*.safetensors"):
        (tmp_path / path.name.replace("network-snapshot", "renamed")).write_bytes(path.read_bytes())
    for _ in range(2):  # the second time, a result lies beside them
        result = run_cli(reconstruct_phema.main, f"--indir={tmp_path}", "--outstd=0.07")
        assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("phema-*"))) == 1


def test_training(tmp_path):
    options = {option[2:].split("=")[0].replace("-", "_"): option.split("=")[1] for option in TINY}
    preset = options.pop("preset")
    numbers = {name: int(value) for name, value in options.items() if name != "channel_mult"}
    c = train_edm2.setup_training_config(preset, data=str(DIGITS), cond=True, channel_mult=(1,), **numbers)
    assert c.dataset.label_dim == 10 and c.config.run.batch == 256
    train_edm2.launch_training(str(tmp_path), c)
    assert list(tmp_path.glob("network-snapshot-*"))
    assert train_edm2.parse_nimg("8Mi") == 8 << 20


def test_metrics(tmp_path, capsys):
    assert {"fid", "fd_dinov2"} <= calculate_metrics.metric_specs.keys()
    assert calculate_metrics.parse_metric_list("fid,fd_dinov2") == ["fid", "fd_dinov2"]
    for name, data in random_images(4).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    detector = calculate_metrics.get_detector("fd_pixels", verbose=False)
    assert detector(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, detector.feature_dim)
    stats_iter = calculate_metrics.calculate_stats_for_files(str(tmp_path), metrics=["fd_pixels"], max_batch_size=2)
    *_, r = stats_iter
    calculate_metrics.save_stats(stats=r.stats, path=str(tmp_path / "ref.pkl"), verbose=True)
    assert "ref.pkl" in capsys.readouterr().out
    ref = calculate_metrics.load_stats(str(tmp_path / "ref.pkl"))
    with pytest.warns(UserWarning, match="small sample"):
        results = calculate_metrics.calculate_metrics_from_stats(stats=r.stats, ref=ref, metrics=["fd_pixels"])
    assert results["fd_pixels"] == pytest.approx(0, abs=1e-6)
