"""Wan's transformer: diffusers' modules, parameters and names with forward passes of this project.

A video has at most two times, 0 for a given first frame and one for the rest, so the modulation has two rows
(B 2 6 D) and each layer picks between them; diffusers makes one row per token (B N 6 D). The numbers are the same.
Shapes: B batch, C channels, T H W latent size, N tokens, K times (1 or 2), D width, L text rows.
"""

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from einops import rearrange
from torch import Tensor

from stage2_distill.model.activation_checkpoint import block_runner
from stage2_distill.model.context_parallel import gather_tokens, local_token_slice
from stage2_distill.model.layers import ExecutionPlan, RotaryEmbedding, embed_patches, final_norm, maybe_compile


class TransformerBlock(WanTransformerBlock):
    """A block whose modulation has one row per time."""

    plan = ExecutionPlan()  # replaced per instance by `convert_transformer`

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: RotaryEmbedding,
        first_frame_tokens: int | None = None,
    ) -> Tensor:
        """Hidden states (B N D) after attention, text attention and feed-forward; temb: (B K 6 D).

        Without `first_frame_tokens` this is diffusers' own forward pass, with temb (B N 6 D).
        """
        if first_frame_tokens is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        return block_runner(self.plan)(self, hidden_states, encoder_hidden_states, temb, rotary_emb, first_frame_tokens)


class WanTransformer(WanTransformer3DModel):
    """The transformer for times (B K); other time tensors take diffusers' own path."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, object] | None = None,
    ) -> tuple[Tensor] | object:
        """Velocity (B C T H W), in a tuple, from latents (B C T H W), times (B K) and text (B L D)."""
        if timestep.ndim != 2 or timestep.shape[1] > 2 or return_dict:
            rest = encoder_hidden_states_image, return_dict, attention_kwargs
            return super().forward(hidden_states, timestep, encoder_hidden_states, *rest)
        plan = self.blocks[0].plan
        frames, height, width = (s // p for s, p in zip(hidden_states.shape[2:], self.config.patch_size, strict=True))
        first_frame_tokens = height * width if timestep.shape[1] == 2 else 0  # those with the first of two times
        rope = self.rope(hidden_states)
        rope = rope[0][..., 0::2].contiguous(), rope[1][..., 1::2].contiguous()  # diffusers stores each angle twice
        x = embed_patches(self.patch_embedding, hidden_states)
        temb, modulation, text, _ = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, timestep_seq_len=timestep.shape[1]
        )
        modulation = rearrange(modulation, "b k (m d) -> b k m d", m=6)
        if plan.ranks > 1:
            own = local_token_slice(x.shape[1], plan.ranks)
            x, rope = x[:, own], (rope[0][:, own], rope[1][:, own])
            first_frame_tokens = max(0, first_frame_tokens - own.start)  # those before this rank's part do not count
        for block in self.blocks:
            x = block(x, text, modulation, rope, first_frame_tokens)
        rows = self.scale_shift_table[:, None] + temb[:, :, None]
        x = self.proj_out(maybe_compile(final_norm, plan)(self.norm_out, x, rows, first_frame_tokens))
        if plan.ranks > 1:
            x = gather_tokens(x, plan.ranks)
        patch = dict(zip(("pt", "ph", "pw"), self.config.patch_size, strict=True))
        pattern = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        return (rearrange(x, pattern, t=frames, h=height, w=width, **patch),)


WanTransformer.__name__ = WanTransformer3DModel.__name__  # save_pretrained writes it, and diffusers must find its class


def convert_transformer(net: WanTransformer3DModel, plan: ExecutionPlan | None = None) -> WanTransformer:
    """Replace the forward passes of a diffusers transformer in place; modules, parameters and names stay."""
    net.__class__ = WanTransformer
    for block in net.blocks:
        block.__class__ = TransformerBlock
        block.plan = plan or ExecutionPlan()  # equal plans share their compiled graphs
    return net
