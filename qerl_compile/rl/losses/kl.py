"""The KL divergence from the policy to a reference model, estimated token by token.

    d = log pi_ref(o_t) - log pi(o_t),      k3 = exp(d) - d - 1

Source: GRPO, arXiv 2402.03300, equation 4; Schulman, "Approximating KL Divergence" (2020), the estimator k3. For tokens
drawn from pi its mean is KL(pi || pi_ref), it is never negative, and it varies less than -d.

Its *gradient* is another matter: the mean of k3's gradient is not the gradient of the KL, because the tokens were
drawn from pi too. Multiplied by the token's ratio rho = pi / pi_old, with gradient, it is (DeepSeek-V3.2, arXiv
2512.02556, equation 7; TRL 1.16 does so by default, `use_bias_correction_kl`). That is `LossOptions.kl_unbiased`; the
factor is applied in `policy.policy_loss`, where the ratio is at hand. With a sequence's ratio (`gspo`) it is only
approximately so.

d is bounded above by 10 (`guards.py`), so a token's k3 is at most 22015, with gradient 0 beyond. There is no lower
bound: for very negative d, k3 is -d - 1, which overflows nowhere.

The reference is the model with its adapter off; computing its log-probabilities is the trainer's business.
"""

import torch

from qerl_compile.rl.losses.guards import MAX_LOG_RATIO


def k3(logp_BT: torch.Tensor, reference_logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Estimates of KL(policy || reference) in nats, [B, T] in the type of `logp_BT`; 0 outside the mask.

    Args:
        logp_BT: float [B, T], log-probabilities under the policy, with gradient.
        reference_logp_BT: float [B, T], under the reference; no gradient flows into it.
        mask_BT: bool [B, T].
    """
    difference_BT = reference_logp_BT.detach().to(logp_BT.dtype) - logp_BT
    difference_BT = torch.where(mask_BT, difference_BT, 0.0).clamp(max=MAX_LOG_RATIO)
    return difference_BT.exp() - difference_BT - 1
