"""The real Hugging Face Accelerate (on the CPU) around the optimizers of `optim`, with
a scheduler: interrupted, saved, resumed: the bits are those of the run that was not."""
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from optimizers_explained import optim
from optimizers_explained.problems import max_diff

REASON = 'accelerate is not installed: saving and resuming under it is not tested'
accelerate = pytest.importorskip('accelerate', reason=REASON)
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

STEPS, MOMENT = 12, 4


@pytest.fixture(autouse=True)
def fresh_state():
    def reset():
        for state in AcceleratorState, GradientState, PartialState: state._reset_state()
    reset()
    yield
    reset()


class Training:
    def __init__(self, name='AdamW', seed=0, lr=0.05, accumulate=1, library=optim):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim < 2]
        groups = [dict(params=decayed), dict(params=rest, weight_decay=0., lr=lr/2)]
        opt = getattr(library, name)(groups, lr=lr, weight_decay=0.1)
        sched = lr_scheduler.OneCycleLR(opt, max_lr=[lr, lr/2], total_steps=2*STEPS)
        gen = torch.Generator().manual_seed(1)
        xs = torch.randn(4*STEPS, 4, generator=gen, dtype=torch.float64)
        ys = torch.randn(4*STEPS, 2, generator=gen, dtype=torch.float64)
        dl = DataLoader(TensorDataset(xs, ys), batch_size=4)
        self.acc = accelerate.Accelerator(cpu=True,
                                          gradient_accumulation_steps=accumulate)
        prepared = self.acc.prepare(model, opt, dl, sched)
        self.model, self.opt, self.dl, self.sched = prepared

    def run(self, first, last):
        for i, (x, y) in enumerate(self.dl):
            if not first <= i < last: continue
            with self.acc.accumulate(self.model):
                self.acc.backward(nn.functional.mse_loss(self.model(x), y))
                if self.acc.sync_gradients:
                    self.acc.clip_grad_norm_(self.model.parameters(), 1.)
                self.opt.step()
                self.sched.step()
                self.opt.zero_grad()
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('name', optim.__all__)
def test_save_and_resume(name, accumulate, tmp_path):
    want = Training(name, accumulate=accumulate).run(0, STEPS)
    first = Training(name, accumulate=accumulate)
    first.run(0, MOMENT)
    first.acc.save_state(tmp_path)
    # other weights and rates: all has to come from the files
    second = Training(name, seed=9, lr=0.01, accumulate=accumulate)
    second.acc.load_state(tmp_path)
    assert max_diff(second.run(MOMENT, STEPS), want) == 0.
    decayed, rest = second.opt.param_groups
    assert decayed['weight_decay'] == 0.1 and rest['weight_decay'] == 0.


@pytest.mark.parametrize('name', ['Lion', 'AdamW'])
def test_the_comparison_notices(name, tmp_path):
    "The negative control: the state of the optimizer is lost on the way."
    want, first = Training(name).run(0, STEPS), Training(name)
    first.run(0, MOMENT)
    first.acc.save_state(tmp_path)
    second = Training(name)
    second.acc.load_state(tmp_path)
    for s in second.opt.state.values(): s.clear()
    assert max_diff(second.run(MOMENT, STEPS), want) > 1e-4


@pytest.mark.parametrize('name', ['SGD', 'Adam', 'AdamW'])
def test_same_training_as_with_torch(name):
    run = [Training(name, library=lib).run(0, STEPS) for lib in (optim, torch.optim)]
    assert max_diff(*run) < 1e-12
    assert max_diff(run[0], Training(name, lr=0.0501).run(0, STEPS)) > 1e-6


def test_the_optimizer_inside_is_ours():
    training = Training()
    assert isinstance(training.opt, accelerate.optimizer.AcceleratedOptimizer)
    saved = training.opt.optimizer.state_dict()
    assert saved['steps'] == ['flip', 'decay', 'adam', 'sgd']
