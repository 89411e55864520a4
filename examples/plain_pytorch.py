"""A policy gradient, then distillation, of a tiny model in plain PyTorch, with q3mega's operators.

    python examples/plain_pytorch.py

Runs on a CPU in seconds and needs `pip install q3mega` alone. The model learns to repeat its
prompt's token: the reward of a completion is the share of its tokens that do.
"""

import torch
from torch import Tensor, nn

from q3mega import ops

VOCAB, WIDTH, LENGTH, GROUP = 8, 32, 4, 16  # ids, hidden size, tokens sampled, samples a prompt
PROMPTS = torch.arange(VOCAB)[:, None].repeat_interleave(GROUP, 0)  # (B, 1)


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(VOCAB, WIDTH), nn.GRU(WIDTH, WIDTH, 1)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, H) hidden states: the operators apply the lm_head."""
        return self.gru(self.embedding(ids).transpose(0, 1))[0].transpose(0, 1)


def sample(model: TinyModel) -> Tensor:
    """(B, 1 + LENGTH): the prompts, and LENGTH sampled tokens behind each."""
    ids = PROMPTS
    for _ in range(LENGTH):
        probs = model.lm_head(model(ids)[:, -1]).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
    return ids


def operands(model: TinyModel, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, H), weight (V, H), targets (N,): the state at token t predicts token t + 1."""
    return model(ids)[:, :-1].flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten()


def train(model: TinyModel, teacher: TinyModel | None, steps: int) -> list[float]:
    """Returns every step's mean reward or, with a teacher, mean KL to it in nats a token."""
    optimizer, history = torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(steps):
        with torch.no_grad():
            ids = sample(model)
            old_logprobs, _ = ops.linear_logprob(*operands(model, ids))
        mask = torch.ones(len(ids), LENGTH)  # 0 at prompt and padding tokens; here are none
        loss_weights = (mask / mask.sum()).flatten()  # the mean over tokens
        hidden, weight, targets = operands(model, ids)
        if teacher is None:
            rewards = (ids[:, 1:] == PROMPTS).float().mean(1)
            groups = rewards.view(-1, GROUP)
            advantages = (groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-4)
            loss = ops.grpo_loss(
                hidden, weight, targets, old_logprobs=old_logprobs, loss_weights=loss_weights,
                advantages=(advantages.view(-1, 1) * mask).flatten(),
            ).loss  # fmt: skip
            history.append(rewards.mean().item())
        else:
            with torch.no_grad():
                teacher_hidden, teacher_weight, _ = operands(teacher, ids)
            loss = ops.distill_loss(
                hidden, weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight,
                loss_weights=loss_weights,
            ).loss  # fmt: skip
            history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return history


if __name__ == "__main__":
    torch.manual_seed(0)
    teacher, student = TinyModel(), TinyModel()
    rewards = train(teacher, None, steps=60)
    print("GRPO, reward:", *(f"{reward:.2f}" for reward in rewards[::10]))
    losses = train(student, teacher, steps=60)
    print("distillation, KL a token:", *(f"{loss:.2f}" for loss in losses[::10]))
