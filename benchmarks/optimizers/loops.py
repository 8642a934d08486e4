"""The ways to call an optimizer: one training step each."""

from __future__ import annotations

from benchmarks.optimizers.training import Training


def plain(training: Training) -> None:
    """Call `step()` after `backward()`."""
    training.evaluate()
    with training.stepping():
        for optimizer in training.optimizers:
            optimizer.step()


def sparse(training: Training) -> None:
    """Let the gradients be sparse, as those of an embedding are."""
    training.evaluate()
    for p in training.parameters:
        p.grad = None if p.grad is None else p.grad.to_sparse()
    with training.stepping():
        training.optimizer.step()


def closure(training: Training) -> None:
    """Give `step` a closure."""
    with training.stepping():
        training.optimizer.step(training.evaluate)


def closure_after_backward(training: Training) -> None:
    """Give `step` a closure for the second gradient, when there is a first."""
    training.evaluate()
    with training.stepping():
        training.optimizer.step(training.evaluate)


def closure_that_knows(training: Training) -> None:
    """Give `step` a closure that evaluates nothing, and returns the loss (AliG)."""
    loss = training.evaluate().item()
    with training.stepping():
        training.optimizer.step(lambda: loss)


def two_calls(training: Training) -> None:
    """Let the optimizer step to where the second gradient is taken, and then from where it was."""
    training.evaluate()
    with training.stepping():
        training.optimizer.first_step(zero_grad=True)
        training.evaluate()
        training.optimizer.second_step()


def two_calls_and_reading(training: Training) -> None:
    """Do the same beside `watcher.step()`."""
    training.evaluate()
    if training.watcher is not None:
        training.watcher.step()
    with training.stepping():
        training.optimizer.first_step(zero_grad=True)
        training.evaluate()
        training.optimizer.second_step()


def inner_closure(training: Training) -> None:
    """Let the optimizer keep a closure of its own (GSAM)."""
    training.optimizer.set_closure(training.criterion, training.x, training.target)
    with training.stepping():
        training.optimizer.step()


def projected(training: Training) -> None:
    """Give the optimizer two losses, for it to make one gradient of them (PCGrad)."""
    output = training.model(training.x)
    losses = [training.criterion(output[part], training.target[part]) for part in (slice(16), slice(16, None))]
    training.optimizer.pc_backward(losses)
    training.passed()
    with training.stepping():
        training.optimizer.step()


def in_backward(training: Training) -> None:
    """Call nothing but `backward()`, which steps."""
    loss = training.loss()
    with training.stepping():
        loss.backward()


def fused_backward(training: Training) -> None:
    """Call the optimizer's own backward pass, which steps (LOMO)."""
    loss = training.loss()
    with training.stepping():
        training.optimizer.fused_backward(loss, lr=1e-3)
