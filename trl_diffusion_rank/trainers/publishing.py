"""Pushing to the Hub while and after training, as Transformers' Trainer does it."""

import logging
from pathlib import Path
from typing import Any, ClassVar

from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from trl_diffusion_rank.hub.upload import HTTPError, refusal, repeated, upload


logger = logging.getLogger(__name__)


def without_token(options: Any) -> dict[str, Any]:
    """`__getstate__` of a config: what is pickled, as `training_args.bin` in every checkpoint, has no `hub_token`."""
    return {**options.__dict__, "hub_token": None}


class PublishingMixin:
    """
    What of `output_dir` goes to the Hub, when, and what is said where it can't. Comes before TRL's trainer among the
    bases.

    Class attributes:
        published_files: patterns, in which `*` matches slashes too, of the files that make up the model. The rest of
            `output_dir` is for resuming and for the run's own records, and may name folders of this machine.
    """

    published_files: ClassVar[tuple[str, ...]]

    # Adds words for a refusal: it comes before hours of training
    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        create = super().init_hf_repo
        try:
            repeated(lambda: create(token, private))
        except (HTTPError, OSError) as error:
            name = self.args.hub_model_id or Path(self.args.output_dir).name
            token = token or self.args.hub_token
            raise ValueError(refusal(error, "The model", name, "hub_model_id", token)) from error

    # Replaces the upload of everything in `output_dir`
    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return self._upload(commit_message, token, revision, blocking)

    # Replaces copying a language model's files out of the checkpoint, by their names
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy == HubStrategy.END:
            return
        running = getattr(self, "push_in_progress", None)  # only the main process has it
        (busy,) = broadcast_object_list([running is not None and not running.is_done()])
        if busy and not self.args.hub_always_push:
            return
        if self.is_world_process_zero():
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self._finish_current_push()  # files must not change while they are being sent
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(message, blocking=False)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                hf_api().run_as_future(
                    upload,
                    checkpoint_folder,
                    self.hub_model_id,
                    allow_patterns=["*"],
                    path_in_repo="last-checkpoint" if is_last else Path(checkpoint_folder).name,
                    token=self.args.hub_token,
                    private=self.args.hub_private_repo,
                    revision=self.args.hub_revision,
                    commit_message=f"{message}, checkpoint",
                )
            )
        self.push_in_progress = PushInProgress(jobs)

    # Adds a word on pushes that failed in the background
    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        running = getattr(self, "push_in_progress", None)
        for job in running.jobs if running is not None else []:
            if job.exception() is not None:
                logger.warning(f"A push during training failed, and training goes on: {job.exception()}")
        self.push_in_progress = None

    def _upload(
        self, commit_message: str, token: str | None = None, revision: str | None = None, blocking: bool = True
    ) -> Any:
        """The model as it lies in `output_dir`; a future where it isn't waited for."""
        options = {
            "allow_patterns": self.published_files,
            "token": token or self.args.hub_token,
            "private": self.args.hub_private_repo,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
        }
        if blocking:
            return upload(self.args.output_dir, self.hub_model_id, **options)
        return hf_api().run_as_future(upload, self.args.output_dir, self.hub_model_id, **options)
