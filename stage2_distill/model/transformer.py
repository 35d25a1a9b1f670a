"""Wan's transformer as this project runs it: diffusers' modules and names, forward passes of our own.

A video has two times at most, 0 for a given first frame and one for the rest, so the modulation has two rows (6 D)
and every kernel picks between them; diffusers makes one row a token (B N 6 D). The numbers are the same.
Shapes: B batch, N tokens, G tokens of the given frame, K times (1 or 2), D width, L text rows, H heads, d head size.
"""

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from einops import rearrange
from torch import Tensor

from stage2_distill.model.activation_checkpoint import block_runner
from stage2_distill.model.context_parallel import gather_tokens, local_token_slice
from stage2_distill.model.layers import ExecutionPlan, RotaryEmbedding, embed_patches, final_norm_function


class TransformerBlock(WanTransformerBlock):
    """A block whose modulation has one row a time."""

    plan = ExecutionPlan()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: RotaryEmbedding,
        first_frame_tokens: int | None = None,
    ) -> Tensor:
        """Hidden states (B N D) after attention, text attention and feed-forward; temb: (B K 6 D), `given`: G.

        Without `given` it is diffusers' own forward, with one row of temb a token.
        """
        if first_frame_tokens is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        return block_runner(self.plan)(self, hidden_states, encoder_hidden_states, temb, rotary_emb, first_frame_tokens)


class WanTransformer(WanTransformer3DModel):
    """The transformer with times (B K); other time tensors take diffusers' own path."""

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
        frames, height, width = (s // p for s, p in zip(hidden_states.shape[2:], self.config.patch_size, strict=True))
        first_frame_tokens = height * width if timestep.shape[1] == 2 else 0
        rope = self.rope(hidden_states)
        rope = rope[0][..., 0::2].contiguous(), rope[1][..., 1::2].contiguous()
        x = embed_patches(self.patch_embedding, hidden_states)
        temb, modulation, text, _ = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, timestep_seq_len=timestep.shape[1]
        )
        modulation = rearrange(modulation, "b k (m d) -> b k m d", m=6)
        ranks = self.blocks[0].plan.ranks
        if ranks > 1:
            local_slice = local_token_slice(x.shape[1], ranks)
            x, rope, first_frame_tokens = (
                x[:, local_slice],
                (rope[0][:, local_slice], rope[1][:, local_slice]),
                max(0, first_frame_tokens - local_slice.start),
            )
        for block in self.blocks:
            x = block(x, text, modulation, rope, first_frame_tokens)
        rows = self.scale_shift_table[:, None] + temb[:, :, None]
        x = self.proj_out(final_norm_function(self.blocks[0].plan.compiled)(self.norm_out, x, rows, first_frame_tokens))
        if ranks > 1:
            x = gather_tokens(x, ranks)
        patch = dict(zip(("pt", "ph", "pw"), self.config.patch_size, strict=True))
        pattern = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        return (rearrange(x, pattern, t=frames, h=height, w=width, **patch),)


WanTransformer.__name__ = WanTransformer3DModel.__name__  # save_pretrained writes it, and diffusers must find its class


def convert_transformer(net: WanTransformer3DModel, plan: ExecutionPlan | None = None) -> WanTransformer:
    """Give a diffusers transformer these forward passes, in place: the same modules, parameters and names."""
    net.__class__ = WanTransformer
    for block in net.blocks:
        block.__class__ = TransformerBlock
        block.plan = plan or ExecutionPlan()
    return net
