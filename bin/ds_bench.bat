@python "%~dp0ds_bench" %*
