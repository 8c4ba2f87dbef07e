"""What compressors learn from: a file per loss, see ``megactx.gist.loss``."""
