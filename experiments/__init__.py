"""Entry points: parse, build the config, call the library, write runs/<name>/. Nothing imports them.

python -m experiments.<name> --help    says what <name> does and lists its options

quickstart   the whole story in minutes: train, prove in PyTorch, sample
pretrain     train a preset from a corpus
export       a run or model directory in another format, proved after writing
gpu_check    what only a CUDA device can show
"""
