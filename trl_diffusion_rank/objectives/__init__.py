from trl_diffusion_rank.objectives.ranking import LOSS_TYPES, ranking_loss


__all__ = ["LOSS_TYPES", "ranking_loss"]
