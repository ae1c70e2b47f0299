"""Pictures for many: a service with batching and a page (`lavin-rt serve`), and folders on a fleet (`lavin-rt map`).

A room on top of `lavin_rt.pipeline`; nothing below knows it. Its options are `lavin_rt.cli.services`'; it is imported
when a command runs, as it needs the extras `serve` or `ray`.

* `engine`: one thread that owns the device; waiting requests of one kind run together, fair between tasks.
* `library`: the tasks there are: the checkpoint's templates, files given at the start, and those that clients make.
* `service`: what a request is held against before it may wait, and the figures about it.
* `routes`, `guard`, `app`, `server`: HTTP: answers, who may ask and how much, the parts put together, draining.
* `page`: the same in a browser.
* `fleet`: `lavin-rt map`, on Ray Data.
"""
