"""MANN: a network with an external memory learns to keep an episode's examples and to find them again.

Santoro, Bartunov, Botvinick, Wierstra, Lillicrap 2016, "Meta-Learning with Memory-Augmented Neural Networks". An
episode is a sequence (x_1, nothing), (x_2, y_1), (x_3, y_2), …: a label comes one step after its image, so the network
must keep the image until it can bind the two, and at x_t it answers y_t. An LSTM reads the sequence; at every step t
each of its R read heads makes a key k_t, and

    w^lu_{t−1}  marks the R rows with the least usage w^u_{t−1}, of which head j gets the j-th    (eq. 6)
    w^w_t = σ(α_t) w^r_{t−1} + (1 − σ(α_t)) w^lu_{t−1}        to where it read last, or to a free row     (eq. 7)
    M_t(i) = M_{t−1}(i) + w^w_t(i) k_t                        the least used rows having been set to zero (eq. 8)
    w^r_t = softmax of the cosines K(k_t, M_t(i)),  r_t = Σ_i w^r_t(i) M_t(i)                             (eqs. 2–4)
    w^u_t = γ w^u_{t−1} + w^r_t + w^w_t, summed over the heads                                            (eq. 5)

and the answer is linear in h_t and the r_t of all heads. No parameter changes in an episode: what is adapted is the
state.

So one k_t says what is looked for and what is written, and over many rows a softmax of cosines is nearly even. Two
parts of the neural Turing machine that this memory comes from (Graves, Wayne, Danihelka 2014, arXiv:1410.5401) can be
had back: `key_strength: learned` reads with softmax(β_t K), β_t > 0 (eq. 5 there), and `written: add_vector` adds a_t
instead of k_t (eq. 4 there), both from the controller at every step.

Meta-training mixes an episode's support and query examples into one sequence, in an order drawn from the episode's key,
and takes the loss of every step. In evaluation and serving the support set comes first, one example of each class, then
the next one of each, in the order of the labels; then each query is asked alone, from a copy of the state it leaves.
So an answer never depends on another query, unless the encoder normalizes them by their own statistics.

What the LSTM reads is [features of the image, y_{t−1}], with any model as the encoder; its head is not used and never
changes. Batch normalization inside an episode takes images, never labels, across time: those of a support set are
normalized by their own statistics, and queries by the same ones (`normalization: inductive`, the default here). An
encoder without it (`mlp`, as good as the paper's, which has none) has no such channel.

Disadvantages: it takes tens of thousands of episodes before it does better than guessing (the paper trains on 100,000);
its answers depend on the order of the support set; it must have seen sequences as long as those it is asked about. A
GPU waits for kernels to launch, as steps follow each other.

Shapes: T tasks · L examples of a sequence · B sequences side by side · U units of the LSTM · R read heads · M rows of
the memory · D numbers in a row · F features · W labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from pipeline import keys
from pipeline.algorithms.episodic import (
    Episodic,
    EpisodicConfig,
    named_gradients,
    needs_features,
    network,
    of_classes,
    only_classification,
    per_task,
)
from pipeline.algorithms.gradient_based import linear
from pipeline.types import (
    Adapted,
    MetaGradient,
    MetaState,
    Normalization,
    Objective,
    Params,
    Statistics,
    TaskBatch,
    TaskModel,
)

OWN = "mann/"  # begins the names of what is not the encoder's
STATE = "mann/state."  # begins the names of the state after a support set, among the adapted parameters
INSTANCES = (1, 2, 5, 10)  # presentations of a class after which the paper reports the accuracy
EPSILON = 1e-8  # under the roots of norms, so that an empty row has a derivative
FIRST_STRENGTH = 10.0  # β before training, where it is learned: one row of 128 can be told from the others
ELEMENTS_AT_ONCE = 1 << 24  # of copies of the memory, one for each query that is asked at once


class MANNConfig(EpisodicConfig):
    """Memory-augmented neural network; the defaults are the paper's."""

    name: Literal["mann"]
    normalization: Normalization = "inductive"  # of queries in meta-training, where the encoder normalizes batches
    controller_units: int = Field(default=200, ge=1)  # U of the LSTM
    memory_rows: int = Field(default=128, ge=1)
    memory_width: int = Field(default=40, ge=1)  # numbers in a row
    reads: int = Field(default=4, ge=1)  # read heads; as many rows are written at every step
    usage_decay: float = Field(default=0.99, ge=0, le=1)  # γ
    key_strength: Literal["one", "learned"] = "one"  # β of the reads
    written: Literal["key", "add_vector"] = "key"  # to the rows: the paper's k_t, or a_t

    @field_validator("reads")
    @classmethod
    def _a_row_for_each(cls, value: int, info: Any) -> int:
        if value > info.data.get("memory_rows", value):
            raise ValueError(f"{value} read heads write as many rows at a time: give memory_rows as many at least")
        return value

    def build(self, *, model: TaskModel, objective: Objective, train_classes: int | None = None) -> MANN:
        """Raises ConfigError: the task is not a classification, or the model has no head."""
        only_classification(self.name, objective)
        needs_features(self.name, model)
        return MANN(self, model=model, objective=objective)


class State(NamedTuple):
    """What B sequences have left in the network."""

    hidden: Tensor  # [B, U]
    cell: Tensor  # [B, U]
    read: Tensor  # r_t [B, R·D]
    memory: Tensor  # M_t [B, M, D]
    read_weights: Tensor  # w^r_t [B, R, M]
    usage: Tensor  # w^u_t [B, M]


class Trace(NamedTuple):
    """What was seen along B sequences."""

    outputs: Tensor  # [B, L, W]
    read_weights: Tensor  # [B, L, R, M]
    gates: Tensor  # σ(α_t) [B, L, R]


class MANN(Episodic):
    """Algorithm: an LSTM with a memory reads the support set, and answers from the state it is left in."""

    config: MANNConfig

    def __init__(
        self, config: MANNConfig, *, model: TaskModel, objective: Objective, train_classes: int | None = None
    ) -> None:
        super().__init__(config, model=model, objective=objective)
        self.labels, self.features = model.init(0)[model.head[0]].shape
        reads = config.reads * config.memory_width
        self._heads = [  # what the controller puts out at a step: keys, write gates, and where they are learned
            reads,
            config.reads,
            config.reads if config.key_strength == "learned" else 0,
            reads if config.written == "add_vector" else 0,
        ]

    def init(self, seed: int) -> MetaState:
        """The encoder's, and uniform ±1/√fan_in for what follows; the LSTM begins by keeping (forget gate's bias 1)."""
        c = self.config
        generator = torch.Generator().manual_seed(seed)
        params = self.model.init(seed)
        reads = c.reads * c.memory_width
        sizes = {  # name: out, in
            "input": (4 * c.controller_units, self.features + self.labels),
            "recurrent": (4 * c.controller_units, c.controller_units + reads),
            "heads": (sum(self._heads), c.controller_units),
            "answer": (self.labels, c.controller_units + reads),
        }
        own: Params = {}
        for name, (fan_out, fan_in) in sizes.items():
            weight = torch.empty(fan_out, fan_in, dtype=torch.float64)
            limit = 1 / math.sqrt(fan_in)
            own[f"{OWN}{name}.weight"] = weight.uniform_(-limit, limit, generator=generator)
            own[f"{OWN}{name}.bias"] = torch.zeros(fan_out, dtype=torch.float64)
        own[f"{OWN}input.bias"][c.controller_units : 2 * c.controller_units] = 1.0
        own[f"{OWN}heads.bias"].split(self._heads)[2].fill_(FIRST_STRENGTH)
        dtype = params[self.model.head[0]].dtype
        return MetaState(params | {k: v.to(dtype) for k, v in own.items()}, {})

    def adaptation_path(
        self,
        state: MetaState,
        support_x: Tensor,
        support_y: Tensor,
        *,
        steps: int,
        inductive: bool,
        num_classes: int | None = None,
        last_only: bool = False,
    ) -> Iterator[Adapted]:
        """The same at every step: the network has read the support set."""
        with torch.no_grad():
            tasks = len(support_x)
            meta_params = {k: v.detach() for k, v in state.params.items()}
            params = per_task(meta_params, tasks)
            features, observed = self.model.features(
                self._encoder(params), self.model.prepare(support_x), observe=inductive
            )
            order = interleaved(support_y, self.labels)
            features, labels = in_order(features, order), support_y.gather(1, order)
            after, _ = self._read_sequence(meta_params, features, labels)
            left = {STATE + name: value for name, value in after._asdict().items()}
            left[STATE + "label"] = labels[:, -1]
            statistics = per_task(state.buffers, tasks) if self._running and state.buffers else observed
            adapted = Adapted(params | left, statistics if inductive else None)
        for _ in range(1 if last_only else steps + 1):
            yield adapted

    def _answer(self, params: Params, query: Any, **how: Any) -> tuple[Tensor, Statistics]:
        """Each query is the next example of a sequence of its own."""
        features, observed = self.model.features(self._encoder(params), query, **how)
        state = State(*(params[STATE + name] for name in State._fields))
        at_once = max(1, ELEMENTS_AT_ONCE // state.memory.numel())
        outputs = [self._ask(params, state, params[STATE + "label"], part) for part in features.split(at_once, dim=1)]
        return torch.cat(outputs, dim=1), observed

    def _ask(self, params: Params, state: State, previous: Tensor, features: Tensor) -> Tensor:
        """Features [T, Q, F] of queries that come after label `previous` [T] and `state` -> [T, Q, W]."""
        tasks, queries = features.shape[:2]
        each = State(*(value.repeat_interleave(queries, dim=0) for value in state))
        labels = F.one_hot(previous, self.labels).to(features.dtype).unsqueeze(1).expand(-1, queries, -1)
        inputs = _linear(params, "input", torch.cat([features, labels], dim=-1)).flatten(0, 1)
        after, _ = self._step(params, inputs, each)
        return _linear(params, "answer", torch.cat([after.hidden, after.read], dim=-1).unflatten(0, (tasks, queries)))

    def meta_grad(self, state: MetaState, batch: TaskBatch, *, step: int) -> MetaGradient:
        meta_params = {k: v.detach().requires_grad_() for k, v in state.params.items()}
        with torch.enable_grad():
            features, labels, observed = self._sequence(meta_params, batch, training=True)
            after, trace = self._read_sequence(meta_params, features, labels)
            outputs = of_classes(trace.outputs, batch.num_classes)
            losses = self.objective.loss(outputs, labels)  # [T]
            grads = torch.autograd.grad(losses.sum(), list(meta_params.values()), allow_unused=True)
        outputs = outputs.detach()
        accuracy = by_instance(outputs, labels, batch.num_classes or self.labels)
        metrics = {
            "meta_loss": losses.detach().sum(),
            "train_accuracy": self.objective.score(outputs, labels).sum(),
            **{f"train_accuracy_instance_{k}": accuracy[:, k - 1].sum() for k in INSTANCES if k <= accuracy.shape[1]},
            "memory_rows_used": perplexity(after.usage.detach()).sum(),
            "memory_rows_read": perplexity(trace.read_weights.detach()).flatten(1).mean(1).sum(),
            "memory_write_gate": trace.gates.detach().flatten(1).mean(1).sum(),
        }
        statistics = {k: v.detach().sum(dim=0) for k, v in observed.items()}
        return MetaGradient(named_gradients(meta_params, grads), metrics, statistics)

    def curves(self, state: MetaState, batch: TaskBatch) -> dict[str, Tensor]:
        """The accuracy at the first, …, tenth example of a class, of whole episodes as sequences: [T, 10 or fewer]."""
        with torch.no_grad():
            features, labels, _ = self._sequence(state.params, batch, training=False)
            classes = batch.num_classes or self.labels
            first = interleaved(labels, self.labels)[:, : max(INSTANCES) * classes].sort(dim=1).values
            features, labels = in_order(features, first), labels.gather(1, first)
            outputs = of_classes(self._read_sequence(state.params, features, labels)[1].outputs, batch.num_classes)
            return {"accuracy_by_instance": by_instance(outputs, labels, classes)}

    def _sequence(self, meta_params: Params, batch: TaskBatch, *, training: bool) -> tuple[Tensor, Tensor, Statistics]:
        """Episodes as sequences: features [T, L, F], labels [T, L], and the statistics seen on the query set."""
        on_support, on_query, on_order = keys.pass_keys(batch.keys, 3)
        if not (training and self.model.stochastic):
            on_support = on_query = None
        encoder = self._encoder(per_task(meta_params, len(batch.support_x)))
        inductive = self._inductive
        support, statistics = self.model.features(
            encoder, self.model.prepare(batch.support_x), observe=inductive, keys=on_support
        )
        query, observed = self.model.features(
            encoder,
            self.model.prepare(batch.query_x),
            statistics=statistics if inductive else None,
            observe=training and self._running,
            low_precision=training,
            keys=on_query,
        )
        features, labels = torch.cat([support, query], dim=1), torch.cat([batch.support_y, batch.query_y], dim=1)
        order = interleaved(labels, self.labels) if on_order is None else shuffled(on_order, labels.shape[1])
        return in_order(features, order), labels.gather(1, order), observed

    def _encoder(self, params: Params) -> Params:
        return network(params)

    def _read_sequence(self, meta_params: Params, features: Tensor, labels: Tensor) -> tuple[State, Trace]:
        """Features [B, L, F] and labels [B, L] of sequences from the start. Parameters are the same for all of them."""
        params = per_task(meta_params, 1)  # one product for all sequences: they are B rows of a single task
        shown = F.pad(F.one_hot(labels[:, :-1], self.labels), (0, 0, 1, 0)).to(features.dtype)  # y_{t−1}; none at first
        inputs = _linear(params, "input", torch.cat([features, shown], dim=-1).flatten(0, 1).unsqueeze(0))
        inputs = inputs.view(*features.shape[:2], -1)
        state = self._empty(features)
        hidden, weights, gates = [], [], []
        for of_step in inputs.unbind(1):
            state, gate = self._step(params, of_step, state)
            hidden.append(torch.cat([state.hidden, state.read], dim=-1))
            weights.append(state.read_weights)
            gates.append(gate)
        outputs = _linear(params, "answer", torch.stack(hidden, dim=1).flatten(0, 1).unsqueeze(0))
        outputs = outputs.view(*features.shape[:2], -1)
        return state, Trace(outputs, torch.stack(weights, dim=1), torch.stack(gates, dim=1))

    def _empty(self, like: Tensor) -> State:
        """Nothing read, nothing written."""
        c, sequences = self.config, len(like)
        units = like.new_zeros(sequences, c.controller_units)
        read = like.new_zeros(sequences, c.reads * c.memory_width)
        memory = like.new_zeros(sequences, c.memory_rows, c.memory_width)
        weights = like.new_zeros(sequences, c.reads, c.memory_rows)
        return State(units, units, read, memory, weights, like.new_zeros(sequences, c.memory_rows))

    def _step(self, params: Params, inputs: Tensor, state: State) -> tuple[State, Tensor]:
        """One example of every sequence. params: of G groups of sequences. inputs: the LSTM's, of x_t, y_{t−1} [B, 4U].

        Returns the new state, and the write gates σ(α_t) [B, R].
        """
        c = self.config
        gates = inputs + _grouped(params, "recurrent", torch.cat([state.hidden, state.read], dim=-1))
        enter, forget, leave, new = gates.chunk(4, dim=-1)
        cell = forget.sigmoid() * state.cell + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        key, gate, strength, vector = _grouped(params, "heads", hidden).split(self._heads, dim=1)
        key = key.tanh().unflatten(1, (c.reads, c.memory_width))  # k_t
        gate = gate.sigmoid()  # σ(α_t)

        lowest = state.usage.topk(c.reads, largest=False).indices  # among rows of one usage any: they are alike
        least = torch.zeros_like(state.read_weights).scatter_(2, lowest.unsqueeze(-1), 1.0)  # w^lu_{t−1}, a row a head
        to_read = gate.unsqueeze(-1)
        write_weights = to_read * state.read_weights + (1 - to_read) * least
        kept = state.memory * (1 - least.sum(1)).unsqueeze(-1)
        added = vector.tanh().view_as(key) if c.written == "add_vector" else key
        memory = torch.baddbmm(kept, write_weights.transpose(1, 2), added)
        cosines = torch.bmm(_unit(key), _unit(memory).transpose(1, 2))
        if c.key_strength == "learned":
            cosines = F.softplus(strength).unsqueeze(-1) * cosines  # β_t K
        read_weights = cosines.softmax(-1)
        usage = c.usage_decay * state.usage + (read_weights + write_weights).sum(1)
        read = torch.bmm(read_weights, memory).flatten(1)
        return State(hidden, cell, read, memory, read_weights, usage), gate


def _linear(params: Params, name: str, x: Tensor) -> Tensor:
    """x [G, N, I] -> [G, N, O], with the parameters of each group."""
    return linear(x, params[f"{OWN}{name}.weight"], params[f"{OWN}{name}.bias"])


def _grouped(params: Params, name: str, x: Tensor) -> Tensor:
    """x [G·N, I] -> [G·N, O]."""
    groups = len(params[f"{OWN}{name}.weight"])
    return _linear(params, name, x.unflatten(0, (groups, -1))).flatten(0, 1)


def _unit(rows: Tensor) -> Tensor:
    """Of length 1, or 0 where they are empty."""
    return rows * (rows.square().sum(-1, keepdim=True) + EPSILON).rsqrt()


def instance_numbers(labels: Tensor, num_labels: int) -> Tensor:
    """How often an example's label came up to it, itself included: labels [T, L] -> 1, 2, … [T, L]."""
    seen = F.one_hot(labels, num_labels).cumsum(1)
    return seen.gather(2, labels.unsqueeze(-1)).squeeze(-1)


def interleaved(labels: Tensor, num_labels: int) -> Tensor:
    """The order [T, L] in which every label comes once, by its number, then every one again: of labels [T, L]."""
    return (instance_numbers(labels, num_labels) * num_labels + labels).argsort(dim=1)


def shuffled(key: Tensor, length: int) -> Tensor:
    """An order [T, length] for each key [T]."""
    return keys.uniform(key, length).argsort(dim=1)


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """x [T, L, F] in the order [T, L]."""
    return x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def by_instance(outputs: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """The accuracy at the first, second, … example of a label, over the labels that have as many.

    outputs [T, L, W], labels [T, L] in the order they came -> [T, L / num_labels]: so many at least one label has.
    """
    shown = labels.shape[1] // num_labels
    numbers = instance_numbers(labels, num_labels).clamp(max=shown + 1)
    correct = (outputs.argmax(-1) == labels).to(outputs.dtype)
    zeros = outputs.new_zeros(len(labels), shown + 2)
    sums, counts = zeros.scatter_add(1, numbers, correct), zeros.scatter_add(1, numbers, torch.ones_like(correct))
    return (sums / counts)[:, 1:-1]


def perplexity(weights: Tensor) -> Tensor:
    """Over how many rows weights [..., M] are spread: the exponential of their entropy."""
    shares = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()
