"""Pictures are decoded once and seen once; nothing stale is served; the stores are bounded."""

import io
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from rewardmap.config import ConfigError, ParallelConfig
from rewardmap.train.forest import pack_forest
from rewardmap.train.forward import Vision, response_hidden
from rewardmap.train.parallel import shard_policy
from rewardmap.train.ranks import join_ranks
from rewardmap.types import DataError, Problem
from rewardmap.vision import Bounded, ImageStore, checksum, read_image

sys.path.append(str(Path(__file__).parent))
import forest_models as models


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def policy(request):
    return models.build(request.param, freeze_vision=True)


@pytest.fixture
def seen(policy, monkeypatch):
    """Pictures given to the tower, call by call."""
    calls = []
    tower = policy.model.model.get_image_features

    def counted(pixels, grids, **options):
        calls.append(len(grids))
        return tower(pixels, grids, **options)

    monkeypatch.setattr(policy.model.model, "get_image_features", counted)
    return calls


def same(a, b):
    return torch.equal(a.merged, b.merged) and all(map(torch.equal, a.deep, b.deep)) and len(a.deep) == len(b.deep)


def test_a_frozen_tower_sees_each_picture_once_per_run(policy, seen):
    one, two = models.PICTURES
    first = policy.image_features([one, two, one])
    again = policy.image_features([two, one])
    assert seen == [1, 1]
    assert same(first[0], first[2]) and same(again[0], first[1]) and same(again[1], first[0])
    assert len(first[0].deep) == (2 if policy.model.config.model_type == "qwen3_vl" else 0)
    fresh = policy.frozen_copy().image_features([one])
    assert same(fresh[0], first[0])


@pytest.fixture
def little_room(policy):
    """The policy's store holds one picture at a time. Weak references to the pixels that were decoded."""
    decoded = []

    class Store(ImageStore):
        def _read(self, source):
            image = super()._read(source)
            decoded.append(weakref.ref(image.pixels))
            return image

    policy._images = Store(policy.image_processor, 0)
    return decoded


def test_what_is_known_of_a_picture_outlives_its_pixels(policy, little_room):
    one, two = models.PICTURES
    first = policy.image(one)
    policy.image(two)
    assert policy.image_info(one) == (first.grid_thw, first.digest)
    assert len(little_room) == 2


def test_kept_features_need_no_pixels(policy, little_room):
    policy.image_features(models.PICTURES)
    decoded = len(little_room)
    policy.image_features(models.PICTURES)
    assert len(little_room) == decoded


def test_a_frozen_tower_holds_the_pixels_of_one_picture(policy, little_room, monkeypatch):
    pictures = []
    for shade in range(4):
        file = io.BytesIO()
        Image.new("L", (64, 64), 50 * shade).save(file, "PNG")
        pictures.append(file.getvalue())
    tower, alive = policy.model.model.get_image_features, []

    def counted(pixels, grids, **options):
        alive.append(sum(pixels() is not None for pixels in little_room))
        return tower(pixels, grids, **options)

    monkeypatch.setattr(policy.model.model, "get_image_features", counted)
    policy.image_features(pictures)
    assert alive == [1, 1, 1, 1]


@pytest.mark.parametrize("way", ["in-place", "data", "load", "buffer"])
def test_changed_weights_are_seen(policy, seen, way):
    picture = models.PICTURES[0]
    before = policy.image_features([picture])[0]
    tower = policy.vision_tower
    weight = next(tower.parameters())
    if way == "in-place":
        with torch.no_grad():
            weight[0].mul_(1.5)
    elif way == "data":
        weight.data[0, 0] += 0.5  # no version counter moves
    elif way == "load":
        tower.load_state_dict({name: value * 1.01 for name, value in tower.state_dict().items()})
    else:
        next(tower.buffers()).mul_(1.1)
    after = policy.image_features([picture])[0]
    assert len(seen) == 2 and not same(before, after)


def test_a_picture_written_anew_is_another_picture(policy, seen, tmp_path):
    path = tmp_path / "map.png"
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(path)
    before = policy.image_features([str(path)])[0]
    problem = Problem("p", str(path), "who?", "TorF1", 1, "", "", "a/b", "easy")
    tokens = policy.encode(problem).image_tokens
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)).save(path)
    assert len(policy.image_features([str(path)])[0].merged) != len(before.merged)
    assert policy.encode(problem).image_tokens > tokens


def test_another_processor_setting_is_another_picture(policy, seen):
    policy.image_features([models.PICTURES[0]])
    processor = policy.image_processor
    processor.image_mean = [0.1, 0.2, 0.3]
    policy._images = ImageStore(processor, 1 << 30)
    policy.image_features([models.PICTURES[0]])
    assert len(seen) == 2


def test_a_trainable_tower_keeps_nothing_and_runs_once_a_step(request):
    policy = models.build("qwen3_vl", freeze_vision=False)
    calls = []
    tower = policy.model.model.get_image_features
    policy.model.model.get_image_features = lambda pixels, grids: (calls.append(len(grids)), tower(pixels, grids))[1]
    batch = models.random_batch(policy, np.random.default_rng(0), prompts=8)
    forests = pack_forest(batch, max(len(x.prompt.token_ids) + max(map(len, x.responses)) for x in batch))
    assert sum(len(forest.images) for forest in forests) > len({x for forest in forests for x in forest.images})
    for step in (1, 2):
        vision = Vision(policy, forests)
        for forest in forests:
            response_hidden(policy, forest, vision).sum().backward()
        vision.backward()
        assert len(calls) == step and len(policy._features) == 0
    assert all(p.grad is not None for p in policy.vision_tower.parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_deep_features_come_in_one_piece_or_picture_by_picture(monkeypatch, whole):
    """transformers split them by picture only after 5.17."""
    policy = models.build("qwen3_vl", freeze_vision=False)
    one, two = models.PICTURES
    expected = policy.image_features([one]) + policy.image_features([two])
    tower = policy.model.model.get_image_features

    def other(pixels, grids, **options):
        out = tower(pixels, grids, **options)
        joined = [level if isinstance(level, torch.Tensor) else torch.cat(level) for level in out.deepstack_features]
        sizes = [len(merged) for merged in out.pooler_output]
        out.deepstack_features = joined if whole else [level.split(sizes) for level in joined]
        return out

    monkeypatch.setattr(policy.model.model, "get_image_features", other)
    for found, wanted in zip(policy.image_features([one, two]), expected, strict=True):
        assert len(found.deep) == 2
        torch.testing.assert_close(found, wanted)


def test_a_frozen_tower_in_the_compute_dtype_keeps_its_rotary_frequencies():
    """float32 masters, bfloat16 compute: what the tower says is what it says of a checkpoint loaded in bfloat16."""
    policy = models.build("qwen2_5_vl", dtype=torch.float32)
    before = {name: buffer.clone() for name, buffer in policy.vision_tower.named_buffers()}
    assert any("inv_freq" in name for name in before)
    with join_ranks(60, alone=True) as ranks:
        shard_policy(policy, ParallelConfig(compute_dtype="bfloat16"), ranks, torch.device("cpu"))
        assert {parameter.dtype for parameter in policy.vision_tower.parameters()} == {torch.bfloat16}
        for name, buffer in policy.vision_tower.named_buffers():
            assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name])


def test_the_checksum_knows_places():
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    before = checksum(module)
    with torch.no_grad():
        module.weight.copy_(module.weight.flip(0))
    assert checksum(module) != before
    with torch.no_grad():
        module.weight.copy_(module.weight.flip(0))
    assert checksum(module) == before


def test_stores_are_bounded():
    store = Bounded(10, len)
    for key in "abc":
        store.put(key, "xxxx")
    assert store.get("a") is None and store.get("b") == "xxxx" and store.bytes == 8
    store.put("d", "yyyy")
    assert store.get("c") is None and store.get("b") == "xxxx", "what was used last stays"
    store.put("e", "z" * 50)
    assert len(store) == 1 and store.get("e"), "one always fits"


def test_many_threads_decode_a_picture_once(policy):
    decoded = []

    class Store(ImageStore):
        def _read(self, source):
            decoded.append(1)
            return super()._read(source)

    store = Store(policy.image_processor, 1 << 30)
    store.prefetch(models.PICTURES)
    results = []
    threads = [threading.Thread(target=lambda: results.append(store.get(models.PICTURES[0]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.get(models.PICTURES[1])
    assert len(decoded) == 2 and len({id(image) for image in results}) == 1


@pytest.mark.parametrize("size", [(64, 64), (200, 133), (1000, 37)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_those_of_the_processor(policy, size, dtype):
    """Bit for bit, smaller or larger than they were, also where a processor keeps the bytes."""
    shades = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    content = saved(Image.fromarray(shades), "PNG")
    processor = policy.image_processor
    limits, usual = {"shortest_edge": 16 * 1024, "longest_edge": 30 * 1024}, processor.image_mean
    policy.model.model.visual.to(dtype)
    for settings in ({"image_mean": usual}, {"image_mean": [0.5] * 3}, {"do_normalize": False, "do_rescale": False}):
        for name, value in (settings | {"size": limits}).items():
            setattr(processor, name, value)
        policy._images = ImageStore(processor, 1 << 30)
        image = policy.image(content)
        expected = processor(images=[read_image(content)], return_tensors="pt")
        assert expected["image_grid_thw"].tolist() == [list(image.grid_thw)]
        assert torch.equal(policy.pixel_values([image]), expected["pixel_values"].to(dtype))
        assert 8 * image.pixels.nbytes == expected["pixel_values"].nbytes


def test_the_bound_of_a_prompt_decodes_nothing_and_holds(policy):
    """Also of a picture that lies, and of characters that composing makes longer."""
    rng, pictures = np.random.default_rng(0), []
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6
    for size, kind, more in (((150, 60), "PNG", {}), ((60, 190), "JPEG", {"exif": lying}), ((31, 33), "PNG", {})):
        pictures.append(saved(Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)), kind, **more))
    read, decoded = policy._images._read, []
    policy._images._read = lambda source: (decoded.append(source), read(source))[1]
    problems = [
        Problem(f"{place}-{text[:3]}", picture, text, "TorF1", 1, "", "", "a/b", "easy")
        for place, picture in enumerate(pictures)
        for text in ("", "How many lines?", "\u0958" * 40, "地铁 é" * 9)
    ]
    bounds = [policy.bound(problem) for problem in problems]
    assert not decoded
    for problem, bound in zip(problems, bounds, strict=True):
        found = policy.encode(problem)
        assert found.image_tokens < len(found.token_ids) <= bound == policy.bound(problem)
    with pytest.raises(DataError, match="cannot be read as an image"):
        policy.bound(Problem("p", b"no picture", "who?", "TorF1", 1, "", "", "a/b", "easy"))


def test_a_processor_that_makes_something_else_is_refused(policy):
    processor = policy.image_processor

    class Odd:
        def __getattr__(self, name):
            return getattr(processor, name)

        def __call__(self, **asked):
            return {"pixel_values": processor(**asked)["pixel_values"].flip(0)}

    with pytest.raises(ConfigError, match="image processor Odd"):
        ImageStore(Odd(), 0).get(models.PICTURES[0])


@pytest.mark.parametrize("freeze_vision", [True, False])
def test_what_a_frozen_tower_has_seen_is_not_decoded_ahead(freeze_vision, monkeypatch):
    policy = models.build("qwen2_5_vl", freeze_vision)
    one, two = models.PICTURES
    problems = [Problem("p", image, "who?", "TorF1", 1, "", "", "a/b", "easy") for image in (one, two)]
    asked = []
    monkeypatch.setattr(policy._images, "prefetch", asked.append)
    policy.prefetch(problems)
    policy.image_features([one])
    policy.prefetch(problems)
    assert asked == [[one, two], [two] if freeze_vision else [one, two]]


def test_an_unreadable_picture_raises_each_time_it_is_asked_for(policy, tmp_path):
    path = tmp_path / "late.png"
    problem = Problem("p", str(path), "who?", "TorF1", 1, "", "", "a/b", "easy")
    policy.prefetch([problem])
    for _ in range(2):
        with pytest.raises(DataError, match=r"late\.png: cannot be read"):
            policy.image(str(path))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
    assert policy.image(str(path)).grid_thw


def saved(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def test_a_picture_is_seen_as_viewers_show_it():
    """Upright where EXIF says so, on white where it is transparent, whatever its mode."""
    clear, red = (0, 0, 0, 0), (255, 0, 0, 255)
    drawn = Image.new("RGBA", (30, 20), clear)
    drawn.paste(red, (0, 0, 10, 20))
    flat = Image.new("RGB", (30, 20), "white")
    flat.paste(red[:3], (0, 0, 10, 20))
    grey = Image.new("LA", (30, 20), (0, 0))
    listed = Image.new("P", (30, 20), 1)
    listed.putpalette([255, 0, 0, 0, 0, 0])
    listed.paste(0, (0, 0, 10, 20))
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6  # shown after a quarter turn to the right
    for picture, options in ((drawn, {}), (listed, {"transparency": 1}), (flat, {}), (flat, {"exif": lying})):
        shown = flat.transpose(Image.Transpose.ROTATE_270) if "exif" in options else flat
        assert np.array_equal(read_image(saved(picture, "PNG", **options)), shown)
    assert read_image(saved(grey, "PNG")).getcolors() == [(600, (255, 255, 255))]
    assert read_image(saved(flat.convert("CMYK"), "JPEG", quality=100)).getpixel((25, 10)) == (255, 255, 255)


def test_sixteen_bits_of_grey_are_shown_as_eight():
    """White where they are transparent. Pillow's mode of a PGM is I, as that of a PNG was once."""
    values = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) * 109
    deep, shown = Image.fromarray(values), (values >> 8).astype(np.uint8)
    assert deep.mode == "I;16"
    for content in (saved(deep, "PNG"), saved(deep, "TIFF"), saved(deep.convert("I"), "PPM")):
        assert np.array_equal(read_image(content), np.stack([shown] * 3, -1))
    shown[values == 109] = 255
    clear = read_image(saved(deep, "PNG", transparency=109))
    assert np.array_equal(clear, np.stack([shown] * 3, -1))


def test_a_picture_that_the_processor_refuses_is_named(policy, tmp_path):
    path = tmp_path / "thin.png"
    Image.fromarray(np.zeros((1, 2000, 3), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"thin\.png: the image processor refuses 2000 x 1 pixels"):
        policy.image(str(path))
    with pytest.raises(DataError, match="picture given as bytes: the image processor refuses"):
        policy.image(path.read_bytes())
