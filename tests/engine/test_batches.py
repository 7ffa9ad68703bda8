"""The loops look into no batch: what they do for classification they do for any task that knows its batches."""
import pytest
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.task import TrainingTask

from pst_timm.data.loaders import TrainData
from pst_timm.engine.batches import LabelledImages
from pst_timm.engine.inference import evaluate
from pst_timm.engine.signals import StopSignals
from pst_timm.engine.training import prepare, train_one_epoch

from .helpers import tiny_train_args

CPU = torch.device('cpu')


def batch_of(count=4):
    return torch.randn(count, 3, 8, 8), torch.arange(count) % 3


def test_labelled_images_are_laid_out_for_the_model():
    images, target = batch_of()
    batches = LabelledImages(CPU, torch.bfloat16, channels_last=True)
    ready, labels = batches.prepare((images, target), training=True)
    assert ready.dtype == torch.bfloat16 and ready.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ready, images.bfloat16()) and torch.equal(labels, target)
    assert batches.size((ready, labels)) == 4 and batches.images((ready, labels)) is ready
    # what is ready already is passed on as it is
    same, _ = LabelledImages(CPU).prepare((images, target))
    assert same.data_ptr() == images.data_ptr() and same.is_contiguous()


def test_images_are_mixed_in_training_alone():
    images, target = batch_of()
    batches = LabelledImages(CPU, mixup_fn=Mixup(mixup_alpha=1., num_classes=3))
    mixed, soft = batches.prepare((images.clone(), target), training=True)
    assert not torch.equal(mixed, images) and soft.shape == (4, 3)
    plain, hard = batches.prepare((images, target))
    assert torch.equal(plain, images) and torch.equal(hard, target)


def test_views_are_averaged_and_the_first_of_several_outputs_counts():
    images, _ = batch_of(6)
    target = torch.tensor([0, 0, 1, 1, 2, 2])
    model = nn.Flatten()
    expected = images.flatten(1)
    output, labels = LabelledImages(CPU).answers(model, (images, target))
    assert torch.equal(output, expected) and torch.equal(labels, target)
    output, labels = LabelledImages(CPU, tta=2).answers(model, (images, target))
    assert torch.allclose(output, (expected[::2] + expected[1::2]) / 2, atol=1e-6) and labels.tolist() == [0, 1, 2]
    first, _ = LabelledImages(CPU).answers(lambda x: (model(x), None), (images, target))
    assert torch.equal(first, expected)


class Boxes:
    """Batches of detection: images of any size in a list, and for each a mapping with its boxes (N, 4)."""

    def prepare(self, batch, training=False):
        images, targets = batch
        return [image.float() for image in images], targets

    def size(self, batch):
        return len(batch[0])

    def loss(self, task, batch):
        return task(*batch)['loss']

    def answers(self, model, batch):
        images, targets = batch
        return model(images), targets

    def images(self, batch):
        return batch[0]


class Detector(nn.Module):
    """One box for every image, whatever it shows."""

    def __init__(self):
        super().__init__()
        self.box = nn.Parameter(torch.zeros(4))

    def forward(self, images):
        return [{'boxes': self.box[None]} for _ in images]


class DetectionTask(TrainingTask):
    def __init__(self):
        super().__init__(verbose=False)
        self.trainable_module = Detector()

    def forward(self, images, targets):
        found = self.trainable_module(images)
        return {'loss': torch.stack([
            (f['boxes'] - t['boxes']).abs().mean() for f, t in zip(found, targets)]).mean()}


class Distance:
    def __init__(self):
        self.total = self.count = 0

    def update(self, output, target):
        self.total += sum((o['boxes'] - t['boxes']).abs().mean().item() for o, t in zip(output, target))
        self.count += len(output)

    def summary(self):
        return {'distance': self.total / self.count}

    def compute(self, distributed=False):
        return self.summary()


class Loader(list):
    dataset = sampler = None


@pytest.fixture
def detection(images, tmp_path):
    """A run whose model, task and data are those of a detector, of batches of 3 and 2 images of different sizes."""
    run = prepare(tiny_train_args(images, tmp_path, log_interval=1, epochs=1))
    targets = [{'boxes': torch.tensor([[1., 2., 3., 4.]])} for _ in range(5)]
    shapes = [(3, 8 + n, 9) for n in range(5)]
    everything = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
    loader = Loader([(everything[:3], targets[:3]), (everything[3:], targets[3:])])
    run.task, run.batches, run.data = DetectionTask(), Boxes(), TrainData(loader, loader, None)
    run.optimizer, run.scheduler = torch.optim.SGD(run.task.parameters(), lr=0.1), None
    return run


def test_detection_trains_and_is_evaluated_by_the_same_loops(detection):
    run = detection
    with StopSignals() as stop:
        metrics, speed = train_one_epoch(run, 0, stop)
    # the loss is the mean over images: 2.5 at first, then one step of 0.1 / 4 closer in each of the coordinates
    assert metrics['loss'] == pytest.approx((3 * 2.5 + 2 * 2.475) / 5)
    assert torch.allclose(run.task.trainable_module.box, torch.full((4,), 0.05))
    seen = []
    found = evaluate(
        run.task.get_eval_model(), run.data.evaluation, Distance(), run.batches, run.autocast,
        observe=lambda output, target: seen.append(len(output)))
    assert found['distance'] == pytest.approx(2.45) and seen == [3, 2]
    assert found['images_per_second'] > 0 and speed['images_per_second'] > 0
