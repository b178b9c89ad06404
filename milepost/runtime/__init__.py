"""The machine at hand: devices and number formats, optimizers, progress, signals."""
