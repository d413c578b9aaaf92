"""Every private name of TRL and Transformers that the trainers lean on: if one goes, this says which."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import Trainer
from transformers.utils import hub as transformers_hub
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.trainer import utils as trainer_utils

from trl_diffusion_rank.objectives import ranking_loss
from trl_diffusion_rank.objectives.reference_free import reference_free_loss
from trl_diffusion_rank.trainers import SUPPORTED_TRL, check_trl_version
from trl_diffusion_rank.trainers.diffusion_cpo_trainer import DiffusionCPOTrainer
from trl_diffusion_rank.trainers.ranked_diffusion_dpo_trainer import RankedDiffusionDPOTrainer


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (DPOTrainer, "_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
        (DPOTrainer, "_precompute_ref_logps", ["self", "dataset", "name", "batch_size"]),
        (Dataset, "_get_cache_file_path", ["self", "fingerprint"]),
        (DPOTrainer, "_set_signature_columns_if_needed", ["self"]),
        (DPOTrainer, "_compute_loss", ["self", "model", "inputs", "return_outputs"]),
        (DPOTrainer, "log", ["self", "logs", "start_time"]),
        (DPOTrainer, "create_model_card", ["self", "model_name", "dataset_name", "tags"]),
        (CPOTrainer, "get_batch_loss_metrics", ["self", "model", "batch", "train_eval"]),
        (CPOTrainer, "prediction_step", ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"]),
        (CPOTrainer, "log", ["self", "logs", "start_time"]),
        (CPOTrainer, "create_model_card", ["self", "model_name", "dataset_name", "tags"]),
        (Trainer, "_set_signature_columns_if_needed", ["self"]),
        (Trainer, "_prepare_inputs", ["self", "inputs"]),
        (Trainer, "_save", ["self", "output_dir", "state_dict"]),
        (Trainer, "_save_optimizer_and_scheduler", ["self", "output_dir"]),
        (Trainer, "_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        (Trainer, "save_model", ["self", "output_dir", "_internal_call"]),
        (Trainer, "init_hf_repo", ["self", "token", "private"]),
        (Trainer, "_push_from_checkpoint", ["self", "checkpoint_folder"]),
        (Trainer, "_finish_current_push", ["self"]),
        (transformers_hub, "hf_api", []),
        (transformers_hub.PushInProgress, "__init__", ["self", "jobs"]),
        (trainer_utils, "hash_module", ["module"]),
        (trainer_utils, "global_then_local_main_first", []),
    ],
)
def test_private_names_and_their_parameters(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_init_calls_the_parents_whole_with_its_own_arguments():
    ours = list(inspect.signature(RankedDiffusionDPOTrainer.__init__).parameters)
    assert ours == list(inspect.signature(DPOTrainer.__init__).parameters)
    ours = list(inspect.signature(DiffusionCPOTrainer.__init__).parameters)
    assert ours == [*inspect.signature(CPOTrainer.__init__).parameters, "quantization_config"]


def test_attributes_that_the_loss_reads_are_set_by_trl():
    source = inspect.getsource(DPOTrainer.__init__)
    for attribute in (
        "beta",
        "loss_types",
        "loss_weights",
        "label_smoothing",
        "ref_model",
        "_metrics",
        "_precompute_model_hash",
    ):
        assert f"self.{attribute} = " in source, attribute
    source = inspect.getsource(CPOTrainer.__init__)
    for attribute in ("beta", "loss_type", "label_smoothing", "cpo_alpha"):
        assert f"self.{attribute} = " in source, attribute


def test_installed_trl_is_supported_and_others_are_refused_in_one_sentence():
    check_trl_version(trl.__version__)
    next_minor = Version(trl.__version__)
    with pytest.raises(ImportError, match=r"works with trl.*found trl 1.15.0: `pip install "):
        check_trl_version("1.15.0")
    with pytest.raises(ImportError, match="found trl"):
        check_trl_version(f"{next_minor.major}.{next_minor.minor + 1}.0")
    assert SUPPORTED_TRL.contains(trl.__version__)


# Parity with TRL's own loss at n = 2


class _Accelerator:
    device = torch.device("cpu")

    def gather(self, tensor):
        return tensor

    gather_for_metrics = gather


class _Outputs:
    """What TRL's fused LM head returns, for sequences of one prompt token and one completion token."""

    def __init__(self, logps: torch.Tensor):
        self.log_probs = logps.unsqueeze(1)
        self.entropy = self.mean_logits = torch.zeros_like(self.log_probs)
        self.is_top1 = torch.zeros_like(self.log_probs, dtype=torch.bool)


def _trl_loss(loss_type: str, logps: torch.Tensor, ref_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """`DPOTrainer._compute_loss` itself, on given log-probabilities (B, 2), chosen first."""
    from collections import defaultdict

    def stacked(values):
        return values.T.reshape(-1)  # TRL's batch is [all chosen, all rejected]

    rows = len(logps)
    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1).train(),
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(),
    )
    ids = torch.ones(2 * rows, 2, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": torch.tensor([[0, 1]]).repeat(2 * rows, 1),
        "ref_chosen_logps": ref_logps[:, 0],
        "ref_rejected_logps": ref_logps[:, 1],
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: _Outputs(stacked(logps)), inputs, False)


@pytest.mark.parametrize(
    ("theirs", "ours", "scale"),
    [
        ("sigmoid", "plackett_luce", lambda beta: 1.0),
        ("sigmoid", "pairwise", lambda beta: 1.0),
        ("hinge", "hinge", lambda beta: 1.0),
        ("ipo", "ipo", lambda beta: beta**2),  # ours is in units of reward, theirs in units of log-probability
    ],
)
def test_parity_with_trls_loss_in_value_and_gradient(theirs, ours, scale):
    beta = 3.0
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps = torch.randn(2, 5, 2, generator=generator)
    logps.requires_grad_()
    expected = scale(beta) * _trl_loss(theirs, logps, ref_logps, beta)
    (expected_gradient,) = torch.autograd.grad(expected, logps)

    rewards = beta * (logps - ref_logps)
    ranks, mask = torch.tensor([[1, 2]]).expand(5, 2), torch.ones(5, 2, dtype=torch.bool)
    loss = ranking_loss(ours, rewards, ranks, mask, error=-2 * logps).mean()
    (gradient,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    if theirs == "sigmoid":
        torch.testing.assert_close(expected, -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean())


@pytest.mark.parametrize(
    ("theirs", "ours", "label_smoothing", "scale"),
    [
        ("sigmoid", "plackett_luce", 0.0, lambda beta: 1.0),
        ("sigmoid", "pairwise", 0.1, lambda beta: 1.0),
        ("hinge", "hinge", 0.0, lambda beta: 1.0),
        ("ipo", "ipo", 0.0, lambda beta: beta**2),  # ours is in units of reward, theirs in units of log-probability
        ("simpo", "simpo", 0.1, lambda beta: 1.0),
    ],
)
def test_parity_with_trls_cpo_loss_in_value_and_gradient(theirs, ours, label_smoothing, scale):
    beta, gamma, cpo_alpha = 3.0, 0.4, 0.7
    logps = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    trainer = SimpleNamespace(
        accelerator=_Accelerator(),
        alpha=0.0,
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=label_smoothing,
        loss_type=theirs,
    )
    losses, _, _ = CPOTrainer.cpo_loss(trainer, logps[:, 0], logps[:, 1])
    # TRL adds cpo_alpha times the mean negative log-likelihood of the chosen; ours is in units of reward
    expected = scale(beta) * losses.mean() + cpo_alpha * beta * -logps[:, 0].mean()
    (expected_gradient,) = torch.autograd.grad(expected, logps)

    ranks, mask = torch.tensor([[1, 2]]).expand(5, 2), torch.ones(5, 2, dtype=torch.bool)
    options = {"beta": beta, "cpo_alpha": cpo_alpha, "simpo_gamma": gamma, "label_smoothing": label_smoothing}
    loss = reference_free_loss(ours, -2 * logps, ranks, mask, **options).mean()
    (gradient,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
