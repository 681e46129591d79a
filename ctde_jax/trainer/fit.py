"""The walk from a model and data to a trained model: `fit`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from ctde_jax.aggregate import Strategy, as_transformation, with_hyperparams_of
from ctde_jax.checkpoint import (
    CHECKPOINTS,
    METRICS,
    Checkpoint,
    Identity,
    Options,
    Position,
    check_outside,
    claimed,
    completed,
    find,
    found_by_the_first,
    make_way,
    named,
    open_saver,
    parts_of,
    plain,
)
from ctde_jax.cost import measure, summary
from ctde_jax.data import Augment, Dataset, count_steps, deal, deal_stream, targets_or_classes
from ctde_jax.devices import PyTree, check_backend, hosts, memory, replica, start
from ctde_jax.errors import InputError, Preempted, check_known, check_whole
from ctde_jax.models import (
    Model,
    Task,
    as_model,
    classification,
    count_params,
    language_modeling,
    unscaled,
    with_raw_inputs,
)
from ctde_jax.rounds import (
    guard,
    make_evaluate,
    make_feed,
    make_gradient,
    make_phases,
    of_first_steps,
    parallel_rounds,
    shapes,
    state,
    steps_a_piece,
    unfinished,
)
from ctde_jax.trainer.checks import check_devices, check_examples_apart, check_run, check_types
from ctde_jax.trainer.log import console, open_log
from ctde_jax.trainer.meter import Clock, Meter
from ctde_jax.trainer.rollback import rolling_back, shrunk, unscaled_state
from ctde_jax.trainer.run import BEST, INPUTS, OTHER_POINT, Best, Run
from ctde_jax.trainer.stop import deferred
from ctde_jax.trainer.trained import Trained, accepts
from ctde_jax.trainer.warm_start import Source, read_source, start_from


@rolling_back
def fit(
    model: Model | Callable[..., Any],
    data: Dataset,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    strategy: Strategy = Strategy(),
    *,
    task: Task | None = None,
    batch_size: int,
    epochs: int | None = None,
    steps: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    partition: Sequence[np.ndarray] | None = None,
    seed: int = 0,
    init_from: Source | None = None,
    init_only: Sequence[str] | None = None,
    augment: Augment | None = None,
    accumulate: int = 1,
    ema_decay: float | None = None,
    reestimate_batches: int = 0,
    patience: int | None = None,
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop",
    eval_every: int | None = None,
    log_every: int = 20,
    run_dir: Path | str | None = None,
    resume: bool = True,
    branch_from: Path | str | None = None,
    save_every: int | None = None,
    keep_checkpoints: int = 2,
    keep_best: str | None = None,
    options: Mapping[str, Any] = {},
    show: bool = True,
    describe: Callable[[PyTree, PyTree], str] | None = None,
    prepare: Callable[[Path], None] | None = None,
) -> Trained:
    """Trains one central model on many devices.

    Ctrl-C ends the training after the dispatch at hand, and what has been trained is returned; a second Ctrl-C ends at
    once. With a `run_dir`, the same call goes on where it was ended, by whatever; its numbers are then those of a run
    that nothing has ended. It may go on with other devices, and another number of them.

    Args:
        model: A model such as `models.mlp(...)`, or any nnx or linen module: `Net`, `Net(64)`,
            `functools.partial(Net, 64)` or `lambda rngs: Net(64, rngs=rngs)`. An nnx module that is already built
            starts from its weights, whatever the seed, and is not changed. See `models.from_nnx` and
            `models.from_linen`, which also take arguments of modes whose meaning cannot be known.
        data: Training and test examples.
        optimizer: Any optax transformation. Its `update` is also passed `grad`, and as `value` and `loss` the mean
            objective of the batch (in local steps, of the replica's part of it). Optimizers that train at one point
            and are evaluated at another, such as `optax.contrib.schedule_free`, are evaluated, returned and exported
            at the latter. For complex parameters it gets what `jax.grad` returns, the conjugate of the direction
            of steepest ascent, as in any optax loop.
        strategy: How the devices agree.
        task: What is minimized and what is reported; by default classification, or language modeling of a text.
        batch_size: The global one, over all devices together.
        epochs: How often to go through the data; give this or `steps`.
        steps: How many optimizer steps to take.
        devices: One replica on each; by default what `devices.start()` returns.
        partition: For each device the indices of the examples that never leave it. With more parts than devices the
            parts are clients, of whom as many as there are devices are drawn for every round. By default all examples
            are dealt anew in every epoch.
        seed: Of the model's start, the data order, augmentation and dropout.
        init_from: Initial parameters: a `Trained`, the path of a run, checkpoint, bundle or safetensors
            file, or a tree of parameters; see `warm_start.Source`. Prints which parameters were taken.
            By default, the model's own random initialization. Every host must be able to read it. A run that
            continues must be given the same parameters again, so name a checkpoint of a run that is training.
        init_only: Patterns of the parameters to take from `init_from`, such as `["encoder/*"]`; the others
            are initialized as usual. By default, all parameters must match.
        augment: Changes every training example before the model sees it; see `augment.py`.
        accumulate: Groups in which a device computes its part of a batch, one after another, to save memory.
        ema_decay: Keeps an exponential moving average of the parameters, whose own share in every aggregation this is;
            then that average is evaluated and returned. It starts at the first parameters, so it needs several times
            1 / (1 - ema_decay) aggregations to forget them. Batch statistics are those of the parameters themselves,
            unless they are estimated anew.
        reestimate_batches: Training batches over which batch statistics are estimated anew before every evaluation.
        patience: Training ends after so many evaluations in a row that have not lowered the validation loss. However
            it ends, the parameters of the lowest are returned. Needs data with a validation split.
        on_nonfinite: What becomes of a run whose loss or parameters become NaN or infinite: it stops; or all devices
            together leave out the rounds in which that happens, unless these are ten in a row; or it goes back to the
            newest checkpoint and on with updates half as large, at most three times.
        eval_every: Steps between two evaluations, which come at the end of a round; by default an epoch.
        log_every: At most so many steps, or a round where that is longer, lie between two rows of the history. One
            dispatch computes as many rows as take a tenth of a second, at least one.
        run_dir: The folder for `metrics.jsonl`, `curves.png` and checkpoints, made where it is not there; None writes
            no files.
        resume: Whether to continue the run in the folder. Its data, program (model, loss, metrics, optimizer,
            augmentation, strategy) and options must be those of this call; a run that is complete is read, and nothing
            is trained. If False, an earlier run moves into the subfolder `previous-1`, or the next number.
        branch_from: The checkpoint of another run, from which a new one goes on with other arguments.
        save_every: At most so many steps, or a round where that is longer, lie between two checkpoints; by default
            those of about a minute. The last step always has one.
        keep_checkpoints: How many of the newest stay.
        keep_best: The loss, or the name of the metric, whose best checkpoint stays beside them, as measured on the
            validation split or else the test split. Whatever is the best so far is saved at once.
        options: What else decides the numbers of the run, by name; a run is continued only if it is the same.
        show: Whether to show progress.
        prepare: Called on host 0 with the folder of a run that starts, before its first checkpoint, to put files there.
        describe: What to print of the parameters and model state (numpy arrays) at every evaluation, such as a text
            that the model has written.

    Raises:
        InputError: An argument breaks a rule, or the folder holds another run; nothing has been trained yet.
        NonFiniteLoss: The loss became NaN or infinite; the metrics until then are in the folder.
        ReplicasDiverged: Devices do not hold alike what they share.
        Preempted: SIGTERM has ended the training, which is saved. Without a `run_dir` it ends the process.
    """
    clock = Clock()
    model = as_model(model)
    check_types(data=data, optimizer=optimizer, strategy=strategy)
    check_devices(devices)
    check_whole(batch_size=batch_size, epochs=epochs, steps=steps, seed=seed, accumulate=accumulate)
    check_whole(eval_every=eval_every, log_every=log_every, save_every=save_every, patience=patience)
    optimizer = as_transformation(optimizer)
    starts_anew = model.unscaled is not None and init_from is None and branch_from is None
    model = unscaled(model)
    devices = list(devices or start())
    check_backend(devices)
    if len(devices) != len(replica.own(devices)) * hosts.count():
        raise InputError(
            "devices", f"must be as many of each of the {hosts.count()} hosts, such as devices.start() returns."
        )
    task = _default_task(data) if task is None else task
    if data.stream is not None:
        batches = deal_stream(data.stream, len(devices), batch_size, partition)
    else:
        batches = deal(data.train, len(devices), batch_size, seed, partition, max(1, strategy.inner_steps))
    total_steps = count_steps(batches.steps_per_epoch, epochs, steps)
    eval_every = batches.steps_per_epoch if eval_every is None else eval_every
    check_run(
        model,
        data,
        optimizer,
        strategy,
        task,
        len(devices),
        batch_size=batch_size,
        seed=seed,
        augment=augment,
        accumulate=accumulate,
        ema_decay=ema_decay,
        reestimate_batches=reestimate_batches,
        patience=patience,
        eval_every=eval_every,
        log_every=log_every,
        save_every=save_every,
        keep_best=keep_best,
        keep_checkpoints=keep_checkpoints,
        on_nonfinite=on_nonfinite,
    )
    check_known("on_nonfinite", on_nonfinite, ("stop", "skip", "rollback"))
    if branch_from is not None and run_dir is None:
        raise InputError("branch_from", "needs a run_dir, the folder of the new run.")
    if keep_best is not None and run_dir is None:
        raise InputError("keep_best", "needs a run_dir, where checkpoints are kept.")
    if strategy.is_exact and partition is not None:
        raise InputError(
            "partition", "must be reshuffled where bits are exact: else devices decide what a batch holds."
        )
    if init_from is not None and branch_from is not None:
        raise InputError("init_from", "cannot be combined with branch_from, which starts from a whole training state.")
    if init_only is not None and init_from is None:
        raise InputError("init_only", "requires init_from.")
    init_only = (init_only,) if isinstance(init_only, str) else None if init_only is None else tuple(init_only)
    if isinstance(init_from, Path | str) and run_dir is not None:
        check_outside(Path(init_from), named("run_dir", run_dir))
    given = None if init_from is None else read_source(init_from)
    if on_nonfinite == "rollback":
        optimizer = shrunk(optimizer)
        if run_dir is None:
            raise InputError("on_nonfinite", "needs a run_dir for rollback, as it goes back to a checkpoint.")
    row_steps = min(log_every, save_every or log_every)
    phases = make_phases(strategy, total_steps, eval_every, row_steps, steps_a_piece(batches))
    parts = "clients" if partition is not None and len(partition) > len(devices) else "on their devices"
    told = plain(
        {
            **options,
            "data": f"{data.name}, {len(data.test.inputs):,} test examples",
            "training examples": None if data.stream else len(data.train.inputs),
            "partition": None if partition is None else f"{len(partition)} parts, {parts}",
            "steps": total_steps,
            "sync_every": strategy.inner_steps,
            "synchronous_steps": strategy.synchronous_steps,
            "exact": strategy.is_exact,
            "batch_size": batch_size,
            "seed": seed,
            "init_from": None if given is None else given.digest,
            "init_only": None if init_only is None else list(init_only),
            "accumulate": accumulate,
            "ema_decay": ema_decay,
            "reestimate_batches": reestimate_batches,
            "patience": patience,
            "on_nonfinite": on_nonfinite,
            "eval_every": eval_every,
            "save_every": save_every if on_nonfinite == "rollback" else None,
            "keep_best": keep_best if on_nonfinite == "rollback" else None,
        }
    )
    told = Options(told, options.flag if isinstance(options, Options) else None)
    saving = {"save_every": save_every, "keep_best": keep_best, "run_dir": None if run_dir is None else str(run_dir)}
    saving["log_every"] = log_every
    trace = partial(parts_of, model, data, task, optimizer, strategy, augment)
    identity = Identity(data, partition, trace, len(devices))
    hosts.compare(lambda: {**told, **saving, **hosts.platform()}, identity.digests)
    screen, is_first = console(quiet=not show), hosts.index() == 0
    folder = None if run_dir is None else named("run_dir", run_dir)
    trunk = None if branch_from is None else named("branch_from", branch_from)
    with ExitStack() as at_end:

        def claim(folder: Path) -> Checkpoint | None:
            at_end.enter_context(claimed(folder))
            return find(folder, resume, trunk, told, identity, screen.print)

        found = None if folder is None else found_by_the_first(partial(claim, folder))
        is_own = folder is not None and resume and found is not None and found.path.parent == folder / CHECKPOINTS
        is_branch = found is not None and not is_own
        position = Position() if found is None else Position(**found.facts["position"])
        phases = unfinished(phases, position.gone_through)

        model = with_raw_inputs(model, data.shift, data.scale)
        init_key, train_key = jax.random.split(jax.random.key(seed))
        first = batches.inputs(0)
        best, keeps_average = Best(patience), ema_decay is not None
        traced = jax.jit(model.init).trace(init_key, first)
        shapes_of_model, shapes_of_state = traced.out_info
        like = state.like_created(
            shapes_of_model, shapes_of_state, optimizer, phases[0].strategy, len(devices), keeps_average
        )
        memory.check_training(like, shapes_of_model, devices)
        init = replica.compiled(traced.lower(), jax.local_devices()[:1], strategy.is_exact)
        params, model_state = init(init_key, first)
        if starts_anew and found is None:
            screen.print("start      random parameters; init_from=trained starts from those of a Trained")
        if given is not None and found is None:
            params, model_state, table = start_from(given, params, model_state, init_only)
            screen.print(table)
        if found is None:
            check_examples_apart(model, params, model_state, data)
        params, model_state = hosts.arrays_of_the_first((params, model_state))
        train_state = state.place(params, model_state, optimizer, phases[0].strategy, devices, keeps_average)
        if found is not None:
            if not is_branch:
                best.restore(found, (params, model_state))
            tensors = {name: tensor for name, tensor in found.tensors.items() if not name.startswith((BEST, INPUTS))}
            replicas, where = found.facts["replicas"], "branch_from" if is_branch else "run_dir"
            fresh = train_state
            train_state = state.from_tensors(tensors, train_state, phases[0].strategy, replicas, devices, where)
            if is_branch:
                train_state = train_state._replace(
                    opt_state=with_hyperparams_of(fresh.opt_state, train_state.opt_state)
                )
            if not is_branch and (position.gone_through == total_steps or best.is_over):
                screen.print(completed(position.step, told))
        feed, key = make_feed(batches, devices), replica.replicate(train_key, devices)
        clock.lap("start-up")

        is_exact = strategy.is_exact
        gradient = make_gradient(model, task, augment, accumulate, is_exact)
        programs, like = [], train_state
        for phase in phases:
            if programs:
                like = phase.like_begun(like, devices)
            rounds = parallel_rounds(
                gradient, optimizer, phase.strategy, devices, batches.axis, ema_decay, on_nonfinite == "skip"
            )
            lowered = replica.lowered(rounds, like, *shapes(batches, phase.spans[0]), np.int32(0), np.int32(0), key)
            look = replica.lowered(guard.make_look(devices, phase.strategy), lowered.out_info[1], like)
            programs.append((replica.compiled(lowered, devices, is_exact), replica.compiled(look, devices)))
            memory.check_program(programs[-1][0], devices)
        center = replica.replicate((params, model_state), devices)
        splits = {"validation": data.validation, "test": data.test}
        evaluate = {
            name: make_evaluate(model, task, split, devices, *center)
            for name, split in splits.items()
            if split is not None
        }
        reestimate = of_first_steps(model, feed, devices, batches.axis, reestimate_batches, key)
        host_of_each = [device.process_index for device in devices]
        traffic = [
            measure(program.as_text(), phase.strategy.inner_steps, host_of_each)
            for (program, _), phase in zip(programs, phases, strict=True)
        ]
        at_first = f", after {phases[1].start} synchronous steps" if len(phases) > 1 else ""
        says = summary(traffic[-1], count_params(params), len(devices)) + at_first
        screen.print(f"wire       {says}")
        clock.lap("compile")

        choose = None if keep_best is None else partial(task.best, keep_best)
        meter = Meter(batches.steps_per_epoch, task, save_every, on_nonfinite == "skip", position)
        kept = 0 if found is None or is_branch else found.facts["rows"]
        left = [phase.after(position.gone_through) for phase in phases]
        if folder is not None and not resume:  # only now, as a module that does not compile must not move anything
            hosts.of_the_first(partial(make_way, folder, resume, screen.print))
        if folder is not None and prepare is not None and (found is None or is_branch):
            hosts.of_the_first(partial(prepare, folder))
        with (
            deferred(saves=folder is not None) as stop,
            open_log(total_steps, folder, show, kept) as log,
            feed([span for spans in left for span in spans]) as pieces,
            nullcontext()
            if folder is None or not is_first
            else open_saver(folder / CHECKPOINTS, keep_checkpoints, choose, folder / METRICS) as saver,
        ):
            facts = {"replicas": len(devices), "options": told, "given_options": plain(options)}
            facts |= {"classes": data.classes, "vocabulary": data.vocabulary, "platform": devices[0].platform}
            facts |= {} if folder is None else {"identity": identity.facts}
            run = Run(
                train_state,
                key,
                meter,
                best,
                log,
                folder is not None,
                saver,
                facts,
                stop,
                evaluate,
                reestimate,
                describe if is_first else None,
                choose,
                {f"{INPUTS}shift": data.shift, f"{INPUTS}scale": data.scale},
            )
            if folder is not None and (found is None or is_branch):
                run.save()
                run.wait()  # no row stands in a folder that has no checkpoint
            center_of = phases[0].make_center(devices)
            for phase, spans, (train_rounds, look), sent in zip(phases, left, programs, traffic, strict=True):
                if stop or best.is_over:
                    break
                if spans and spans[0].start == phase.start > 0:
                    run.train_state = phase.begin(run.train_state, devices)
                is_elsewhere = state.has_evaluated_point(run.train_state, phase.strategy) and not strategy.diverges
                run.facts = {**facts, OTHER_POINT: is_elsewhere}
                center_of = phase.make_center(devices)
                shared = list(guard.shared(run.train_state, phase.strategy))
                for span in spans:
                    if stop or best.is_over:
                        break
                    meter.start(span, sent.sent)
                    run.go_through(islice(pieces, span.pieces), train_rounds, look, shared)
                    clock.lap("train")
                    if meter.is_at_end:
                        run.evaluate(center_of)
                        if stop or best.is_over or span.stop == total_steps or meter.is_save_due() or run.is_best:
                            run.save()
                    else:
                        run.save()
                    clock.lap("evaluate")
            run.wait()
            if saver is not None and saver.best is not None:
                log.say(f"best       {saver.best}, by {keep_best}")
            is_whole = meter.position.gone_through == total_steps or best.is_over
            if stop.asked_by and stop.is_preemption and folder is not None and not is_whole:
                raise Preempted(meter.position.step, folder, stop.asked_by.name)
            if best.center is None and not run.is_evaluated:
                run.evaluate(center_of)  # where Ctrl-C came: rows that are cut off again when the run goes on
                clock.lap("evaluate")

    params, model_state = best.center or jax.device_get(run.center)
    opt_state = state.of_optimizer(run.train_state)
    if on_nonfinite == "rollback":
        opt_state = unscaled_state(opt_state)
    return Trained(
        model=model,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        step=best.step or log.rows[-1]["step"],
        history=log.rows,
        seconds=clock.seconds,
        interrupted=bool(stop) and not is_whole,
        stopped_early=best.is_over,
        task=task,
        devices=devices,
        traffic=traffic[-1],
        accepts=accepts(data),
        platform=devices[0].platform,
    )


def _default_task(data: Dataset) -> Task:
    if data.vocabulary:
        return language_modeling
    if data.classes:
        return classification
    raise InputError(
        "task",
        f"must be given, as Task(loss), unless labels are classes or a text; {targets_or_classes(data.train.labels)}.",
    )
