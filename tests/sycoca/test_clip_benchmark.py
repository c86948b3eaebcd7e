"""The names under which CLIP_benchmark calls a model."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from sycoca.clip_benchmark import load
from sycoca.generate import generate_tokens
from sycoca.hub import load_pretrained
from sycoca.images import eval_transform
from sycoca.tokenizer import Tokenizer
from tests.sycoca.micro import build, micro


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = micro()
    config = replace(base, text=replace(base.text, vocab_size=300))
    path = tmp_path_factory.mktemp("model")
    build(config).save_pretrained(path, tokenizer=Tokenizer.train(["a red circle", "two blue squares"], 280))
    return path


def test_encoders_captions_transform_and_tokenizer(folder):
    adapted, (model, tokenizer, config) = load(folder, num_beams=2), load_pretrained(folder)
    picture = Image.new("L", (70, 50), 90)
    images = torch.stack([adapted.transform(picture)] * 2)
    assert torch.equal(images[0], eval_transform(picture.convert("RGB"), config.vision.image_size))
    tokens = adapted.tokenizer(["a red circle", "two blue squares"])
    assert torch.equal(tokens, tokenizer.encode(["a red circle", "two blue squares"], config.text.context_length))
    assert torch.equal(adapted.tokenizer("a red circle"), tokens[:1])
    with torch.no_grad():
        assert torch.equal(adapted.model.encode_image(images), model.encode_image(images).features)
        assert torch.equal(adapted.model.encode_text(tokens), model.encode_text(tokens).features)
        wanted = generate_tokens(model, model.encode_image(images), num_beams=2).tokens[:, 0]
    assert torch.equal(adapted.model.generate(images), wanted) and wanted[0, 0] == config.text.sot_id
    assert not adapted.model.encode_image(images).requires_grad and not adapted.model.training
