"""Batches: the same for any number of workers and ranks and from any place on; bad samples cost nothing but a count."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sycoca.images import center_image, normalise, random_image
from sycoca.tokenizer import Tokenizer
from train.data import DataError, batches, open_dataset
from train.data.sample import BadSample, Sample, Skipped, Source

ROOT = Path(__file__).parents[3]
TOKENIZER = Tokenizer.train(["one two three four five six seven eight nine ten of a caption"], 300)
FORM = {"image_size": 16, "context_length": 12}


class Numbers(Source):
    """Pictures that show their index, with five captions each; those in `bad` cannot be used."""

    def __init__(self, size, bad=(), fresh=False):
        self.name, self.split, self.fresh, self.skipped = "numbers", "train", fresh, Skipped()
        self.size, self.bad = size, frozenset(bad)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample("unreadable image", f"n{index}")
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        return Sample(pixels, tuple(f"caption {word} of {index}" for word in "abcde"), f"n{index}")


def take(count, source, **options):
    loader = batches(source, TOKENIZER, **{"global_batch": 8, "seed": 1, **FORM, **options})
    made = list(itertools.islice(loader, count))
    loader.close()
    return made


def joined(pieces):
    """One batch of several of the same place."""
    (place,) = {(piece.epoch, piece.index) for piece in pieces}
    tensors = (torch.cat(part) for part in zip(*(piece[:4] for piece in pieces)))
    return type(pieces[0])(*tensors, sum((piece.keys for piece in pieces), ()), *place)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4])) and a[4:] == b[4:]


def test_a_batch_has_the_promised_form():
    (batch,) = take(1, Numbers(20))
    assert batch.images.shape == (8, 3, 16, 16) and batch.images.dtype == torch.float32
    assert batch.tokens.shape == (8, 12) and batch.tokens.dtype == torch.int64
    assert batch.seeds.shape == batch.ids.shape == (8,)
    assert batch.seeds.dtype == batch.ids.dtype == torch.int64 and (batch.seeds >= 0).all()
    assert (batch.epoch, batch.index) == (0, 0)
    assert batch.keys == tuple(f"n{i}" for i in batch.ids.tolist())
    texts = TOKENIZER.decode(batch.tokens)
    assert all(text.endswith(f" of {i}") for text, i in zip(texts, batch.ids.tolist()))


def test_an_epoch_shows_every_sample_once():
    source = Numbers(24)
    made = take(6, source)
    for epoch in (made[:3], made[3:]):
        assert sorted(torch.cat([b.ids for b in epoch]).tolist()) == list(range(24))
    assert [(b.epoch, b.index) for b in made] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert not torch.equal(torch.cat([b.ids for b in made[:3]]), torch.cat([b.ids for b in made[3:]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_are_the_pieces_of_a_rank_s_share(workers):
    source, options = Numbers(24), {"rank": 1, "world": 2, "start": 1}
    whole = take(3, source, **options)
    parts = take(6, source, parts=2, workers=workers, **options)
    assert all(len(part.ids) == 2 for part in parts)
    for batch, pieces in zip(whole, zip(parts[::2], parts[1::2]), strict=True):
        assert same(batch, joined(pieces))
    with pytest.raises(ValueError, match="parts 3 do not agree"):
        take(1, source, parts=3, **options)


def test_what_does_not_fill_a_batch_is_left_out():
    made = take(4, Numbers(23))
    assert [(b.epoch, b.index) for b in made] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(len(b.keys) == 8 for b in made)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    source = Numbers(40, bad=(3, 17))
    assert all(map(same, take(7, source), take(7, source, workers=workers)))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_each_global_batch(world):
    source = Numbers(40, bad=(5,))
    whole = take(6, source)
    parts = [take(6, source, rank=rank, world=world) for rank in range(world)]
    for batch, shares in zip(whole, zip(*parts)):
        for field in range(4):
            assert torch.equal(batch[field], torch.cat([share[field] for share in shares]))
        assert batch.keys == sum((share.keys for share in shares), ())


@pytest.mark.parametrize("workers", [0, 2])
def test_any_place_can_be_resumed_from(workers):
    source = Numbers(40)
    whole = take(12, source)
    for done in (1, 4, 5, 7):
        last = whole[done - 1]
        rest = take(12 - done, source, epoch=last.epoch, start=last.index + 1, workers=workers)
        assert all(map(same, whole[done:], rest))


def test_epochs_end_the_loader():
    assert len(take(100, Numbers(24), epochs=2)) == 6
    assert len(take(100, Numbers(24), epoch=1, start=2, epochs=2)) == 1
    assert take(100, Numbers(24), epoch=2, epochs=2) == []


def test_seeds_order_captions_and_crops_follow_the_seed():
    source = Numbers(40)
    one, other = take(5, source, seed=1), take(5, source, seed=2)
    assert not torch.equal(one[0].ids, other[0].ids)
    by_id = {int(i): (s, t, p) for b in one for i, s, t, p in zip(b.ids, b.seeds, b.tokens, b.images)}
    changed = [0, 0, 0]
    for batch in other:
        for i, seed, tokens, image in zip(batch.ids, batch.seeds, batch.tokens, batch.images):
            before = by_id[int(i)]
            for kind, value in enumerate((seed, tokens, image)):
                changed[kind] += not torch.equal(before[kind], value)
    assert changed[0] == 40 and changed[1] > 20 and changed[2] > 30


def test_a_sample_is_seen_the_same_way_in_any_batch_of_an_epoch():
    source = Numbers(48)
    small, large = take(12, source, global_batch=4), take(3, source, global_batch=16)
    views = [
        {int(i): (s, t, p) for b in made for i, s, t, p in zip(b.ids, b.seeds, b.tokens, b.images)}
        for made in (small, large)
    ]
    assert views[0].keys() == views[1].keys()
    for key, view in views[0].items():
        assert all(torch.equal(a, b) for a, b in zip(view, views[1][key]))


def test_epochs_show_other_captions_and_crops():
    source = Numbers(8)
    seen = {}
    for batch in take(40, source):
        for i, text, seed in zip(batch.ids.tolist(), TOKENIZER.decode(batch.tokens), batch.seeds.tolist()):
            seen.setdefault(i, []).append((text, seed))
    for views in seen.values():
        assert len({text for text, _ in views}) == 5
        assert len({seed for _, seed in views}) == 40


def test_crops_are_chosen_by_the_caller():
    source = Numbers(8)
    (plain,) = take(1, source, crop_scale=None)
    (cropped,) = take(1, source, crop_scale=(0.2, 0.4))
    (raw,) = take(1, source, crop_scale=None, normalised=False)
    for row, i in enumerate(plain.ids.tolist()):
        expected = torch.from_numpy(center_image(source[i].image, 16))
        assert torch.equal(raw.images[row], expected)
        assert torch.equal(plain.images[row], normalise(expected))
        assert not torch.equal(plain.images[row], cropped.images[row])
    # A crop of the whole area is the whole picture, where its aspect is legal.
    square = random_image(
        np.ascontiguousarray(source[0].image[:, :20]), 16, np.random.default_rng(0), ratio=(1, 1), scale=(1, 1)
    )
    whole = Image.fromarray(np.ascontiguousarray(source[0].image[:, :20])).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(square, np.array(whole))


def test_fresh_sources_go_on_from_epoch_to_epoch():
    made = take(6, Numbers(24, fresh=True))
    numbers = [int(key[1:]) for batch in made for key in batch.keys]
    assert sorted(numbers) == list(range(48))
    assert sorted(numbers[:24]) == list(range(24))
    repeated = take(6, Numbers(24))
    assert {key for batch in repeated for key in batch.keys} == {f"n{i}" for i in range(24)}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_and_counted(workers):
    bad = {2, 3, 11, 19}
    source = Numbers(24, bad=bad)
    loader = batches(source, TOKENIZER, global_batch=8, seed=4, workers=workers, **FORM)
    made = list(itertools.islice(loader, 6))
    loader.close()
    assert all(batch.images.shape == (8, 3, 16, 16) for batch in made)
    shown = [int(key[1:]) for batch in made for key in batch.keys]
    assert not set(shown) & bad and set(shown) == set(range(24)) - bad
    assert shown == torch.cat([batch.ids for batch in made]).tolist()
    # Twice in two epochs, counted once each.
    assert loader.skipped.counts() == {"unreadable image": 4}
    # The good ones stand where they would stand anyway.
    clean = [int(key[1:]) for batch in take(6, Numbers(24), seed=4) for key in batch.keys]
    assert [a for a, b in zip(shown, clean) if b not in bad] == [b for b in clean if b not in bad]


def test_stand_ins_of_one_image_share_its_id():
    # Two of three are bad, so the good one stands in more than once, and the loss must know.
    (batch,) = take(1, Numbers(3, bad=(0, 1)), global_batch=3)
    assert batch.ids.tolist() == [2, 2, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples_stops(workers):
    with pytest.raises(DataError, match="unreadable image") as caught:
        take(1, Numbers(8, bad=range(8)), workers=workers)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data source 'numbers'")


def test_arguments_are_checked():
    with pytest.raises(DataError, match="7 samples do not fill a batch of 8"):
        take(1, Numbers(7))
    for wrong in ({"world": 3}, {"rank": 1}, {"global_batch": 0}, {"epoch": -1}, {"start": 4}):
        with pytest.raises(ValueError, match=r"batches:"):
            take(1, Numbers(24), **wrong)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_process_keeps_its_random_state(workers):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(3, Numbers(24), workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_scenes_and_tables_load_alike(tmp_path):
    scenes = open_dataset("scenes?count=32")
    rows = ["image\tcaption"]
    for i in range(16):
        sample = scenes[i]
        Image.fromarray(sample.image).save(tmp_path / f"{i}.png")
        rows += [f"{i}.png\t{caption}" for caption in sample.captions]
    (tmp_path / "t.tsv").write_text("\n".join(rows))
    table = open_dataset(f"{tmp_path / 't.tsv'}?val_share=0.0001")
    for source in (scenes, table):
        (batch,) = take(1, source, image_size=64, crop_scale=None)
        by_key = {source[i].key: source[i] for i in range(len(source))}
        for key, image in zip(batch.keys, batch.images):
            picture = np.array(by_key[key].image)
            assert torch.equal(image, normalise(torch.from_numpy(picture)))


def test_workers_say_nothing_and_leave_nothing(tmp_path):
    code = """if True:
        import multiprocessing
        import warnings; warnings.simplefilter("always")
        from sycoca.tokenizer import Tokenizer
        from train.data import batches, open_dataset
        source = open_dataset("scenes?count=64")
        tokenizer = Tokenizer.train(source.texts(), 400)
        # Threads of the tokenizers library before the fork, more workers than cores.
        tokenizer.encode(list(source.texts(50)), 16)
        loader = batches(source, tokenizer, global_batch=8, image_size=64, context_length=16, workers=3)
        for _ in range(10):
            next(loader)
        loader.close()
        assert not multiprocessing.active_children()
        assert next(loader, None) is None
        print("done")
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("done\n", "")
