"""One function f(source, step) -> Panel for each thing that is drawn of a training."""
