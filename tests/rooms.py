"""The rooms of the package, drawn once: tests hold the code and the page on architecture to them."""

ROOMS = [  # a module imports from its own row and from rows above it; one named with its room has a row of its own
    {"numerics", "errors", "files", "progress", "label_form", "loss", "plugin", "privacy", "raster", "torch_file"},
    {"network", "models"},
    {"protocol", "knowledge", "likelihood", "bundle", "observation", "reconstruction", "domain", "truth", "update"},
    {
        "layer",
        "layers",
        "inversion",
        "analysis",
        "attack",
        "case",
        "defence",
        "metric",
        "adapters",
        "data",
        "training_step",
    },
    {"attacks", "analyses", "defences", "metrics", "cases"},
    {"reporting"},
    {"auditing"},
    {"testing", "command", "benchmarks", "__main__", "adapters.flower", "adapters.nvflare"},
]
