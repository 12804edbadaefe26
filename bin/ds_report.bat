@python "%~dp0ds_report" %*
