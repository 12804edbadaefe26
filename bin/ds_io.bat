@python "%~dp0ds_io" %*
