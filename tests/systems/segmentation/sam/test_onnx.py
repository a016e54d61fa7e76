"""Both ONNX files, computed by ONNX Runtime, give what the model gives."""

from __future__ import annotations

import pytest
import torch
from tests.systems.segmentation.sam import small

from volvelle.systems import sam
from volvelle.systems.segmentation.sam.onnx import FINE, PromptAnswerer, export_onnx


def test_the_answerer_is_prompt_encoder_and_mask_decoder():
    net, given = small.model(), small.prompts(k=4)
    embedding = torch.randn(1, 64, 10, 10)
    place = net.prompt_encoder.position()
    points = torch.cat((given["points"][0], given["boxes"].view(4, 2, 2)), 1)
    labels = torch.cat((given["labels"][0], torch.tensor([2, 3]).expand(4, 2)), 1)
    for has, names in ((1.0, ("points", "labels", "boxes", "masks")), (0.0, ("points", "labels", "boxes"))):
        with torch.no_grad():
            sparse, dense = net.prompt_encoder(**{name: given[name] for name in names})
            logits, iou = PromptAnswerer(net)(
                embedding, points, labels.float(), given["masks"].transpose(0, 1), torch.tensor([has])
            )
            for multimask, part in ((False, slice(0, 1)), (True, slice(1, None))):
                wanted = net.mask_decoder(embedding, place, sparse, dense, multimask)
                torch.testing.assert_close(logits[:, part], wanted[0][0], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(iou[:, part], wanted[1][0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("kind", ["vit", "lite0_fine"])
def test_onnx_runtime_computes_the_same(kind, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = small.model() if kind == "vit" else sam(kind, size=96)
    encoder, decoder = (runtime.InferenceSession(path) for path in export_onnx(net, tmp_path))
    size, width = net.config.size, net.config.width
    for b in (1, 3):
        pixels = torch.randn(b, 3, size, size)
        found = encoder.run(None, {"pixels": pixels.numpy()})
        with torch.no_grad():
            features = net.image_encoder.features(pixels)
        for mine, want in zip(found, (features.embedding, *features.fine), strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), want, atol=1e-3, rtol=0)
    for k, n, has in ((1, 1, 0.0), (4, 5, 1.0)):
        inputs = {
            "image_embeddings": torch.randn(1, width, size // 16, size // 16),
            "point_coords": torch.rand(k, n, 2) * size,
            "point_labels": torch.randint(-1, 4, (k, n)).float(),
            "mask_input": torch.randn(k, 1, size // 4, size // 4),
            "has_mask_input": torch.tensor([has]),
            **{name: torch.randn(1, *shape) for name, shape in zip(FINE, net.config.fine, strict=False)},
        }
        found = decoder.run(["low_res_masks", "iou_predictions"], {name: x.numpy() for name, x in inputs.items()})
        with torch.no_grad():
            wanted = PromptAnswerer(net)(*inputs.values())
        for mine, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), want, atol=1e-3, rtol=0)
