import signal

# What a shell starts in the background ignores Ctrl-C, and hands that down to all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
