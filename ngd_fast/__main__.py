from ngd_fast.cli import main

main()
