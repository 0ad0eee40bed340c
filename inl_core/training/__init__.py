"""Batches -> a trained checkpoint. The files, in the order in which a run needs them:

    session.py          a run from its recipe to a trainer: own the directory, find or prepare data, resume or start
    distributed.py      the processes of a run
    claim.py            the lock on the run's directory
    run_status.py       how a run stands, and the word that a session leaves at its end
    resuming.py         the recipe and the checkpoint that a resumed run starts from
    run_data.py         the prepared data of a run
    run.py              the run's directory: recipe, environment, what goes into each checkpoint

    trainer.py          the loop: step, log, save, evaluate
    step.py             one optimizer step
      prefetch.py         its batch, loaded while the step before it computes
      schedules.py        learning rate, drawn iterations, and what is due
      cycles.py           weights of the losses and amplitude of the excitation in each phase
      gradients.py        the gradient of a global batch, split over micro-batches and ranks
      parallel.py         the one model of all ranks, whole, copied or divided (layout.py chooses)
      loss_module.py      the forward pass of one micro-batch (losses.py, precision.py)
      nonfinite.py        the watch for NaN and infinity, and what is written down about such a step (flight_record.py)
        examination.py      the step taken again, to see where it goes wrong (first_bad.py)
      optimizers.py       AdamW and Muon, and which parameters decay
      adaptation.py       the moving average of mu, and the layers' budgets
    run_log.py          rows of metrics (metrics.py, mirrors.py), warnings of jumps (spikes.py), records of the dynamics
                        (dynamics.py measures, depth.py and spread.py say what, records.py writes and reads) and alarms
                        of what has collapsed (alarms.py)
    saving.py           checkpoints (checkpoint.py) and which of them stay (retention.py)
    validation.py       scores on the validation split
    interruption.py     signals that ask a run to end
    observer.py         what a run tells whoever shows it

Nothing is imported here, because the command line listens for signals (interruption.py) before it imports torch.
"""
