"""A scheduler for timesteps that no setting of FlowMatchLCMScheduler visits; load with `trust_remote_code=True`."""

from diffusers import FlowMatchLCMScheduler
from diffusers.configuration_utils import register_to_config


class FewStepScheduler(FlowMatchLCMScheduler):
    """Visits `student_sigmas`, whatever number of steps is requested; a step adds fresh noise to x0."""

    @register_to_config
    def __init__(self, student_sigmas: list[float], num_train_timesteps: int = 1000) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int | None = None, device: object = None, **_: object) -> None:
        """Set the student's own sigmas; ValueError for another number of steps than it has."""
        sigmas = list(self.config.student_sigmas)
        if num_inference_steps not in (None, len(sigmas)):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: this student has {len(sigmas)} steps; give that number"
            )
        super().set_timesteps(sigmas=sigmas, device=device)
