# shellcheck shell=bash disable=SC2034,SC2154
# deep: 10,000 layers of D 128, 2.1 billion parameters, on one GPU of 80 GB or more.
#   keel                Post-Norm whose branches have the constant weight 1 / (2 L): norm(2 L X + F); lr 7e-4, 600 steps
#   again-keel          the same once more, on another card
#   start               the same for 10 steps: where its gradients are checked first
#   mvsplit-beta=1e-4   what MV-Split needs there, 150 steps each: beta 1 / L,
#   mvsplit-lr=1e-4     beta 0.01 at a lower rate,
#   mvsplit-warmup=600  and behind a longer warm-up
# Of the weights of `start` and of both of `keel` the gradients are checked against dual numbers, in fp64 and on few
# tokens: that takes about 100 GB of memory. Only weights are saved, so a run that is interrupted starts again.
columns="attention_g_mean attention_g_ctr ffn_g_mean ffn_g_ctr attention_tcs attention_rho"
pictures=keel tables=gradcheck

runs() {
  local one depth=10000 steps=600 few=150 begin=10 keel=5e-5
  if [ "$SCALE" = tiny ]; then depth=12 steps=60 few=40 begin=5 keel=0.0417; fi
  local shared="depth=$depth save=weights save-every=0 spike-factor=0"
  keel="residual=rezero lambda=$keel fix=lambda writer-std=0"
  ten_thousand start $keel steps=$begin keep=weights
  for one in keel again-keel; do
    ten_thousand $one $keel steps=$steps keep=weights columns=8 diagnose-every=50 diagnose-layers="$(layers 41 $depth)"
  done
  ten_thousand mvsplit-beta=1e-4 beta=1e-4 steps=$few
  ten_thousand mvsplit-lr=1e-4 beta=0.01 lr=1e-4 steps=$few
  ten_thousand mvsplit-warmup=600 beta=0.01 warmup=600 steps=$few
}
# shellcheck disable=SC2086
ten_thousand() { run "$1" $shared "${@:2}"; }

after() {
  local side
  case ${1##*/} in start | keel | again-keel) ;; *) return 0 ;; esac
  side=$((2 * $(option patch "$1/recipe.ini")))  # four image tokens
  "$program" gradcheck --weights "$1/weights.safetensors" --height $side --image-width $side --step 0 --device cpu \
    >"$1/gradcheck.txt" || return
  awk 'BEGIN { print "family,numbers,by_hand,dual,error" }
    $NF == "ok" && NF >= 6 { name = $1; for (i = 2; i <= NF - 5; i++) name = name " " $i
      print name "," $(NF - 4) "," $(NF - 3) "," $(NF - 2) "," $(NF - 1) }' "$1/gradcheck.txt" >"$1/gradcheck.csv"
}

draw() {
  results_table
  echo "The exact check of the gradients, a direction a family of parameters or inputs: the derivative by hand against that"
  echo "by dual numbers. Errors are relative to the family's gradient or, where this is small, to a thousandth of the output"
  echo "by the size of the values; so the last column counts the families whose two derivatives are alike in all 11 digits."
  echo
  echo "| run | families | largest error | of | alike |"
  echo "|---|---|---|---|---|"
  unpacked gradcheck | awk -F, 'NR > 1 { n[$1]++; alike[$1] += $4 == $5; if ($6 + 0 >= most[$1]) { most[$1] = $6 + 0; of[$1] = $2 } }
    END { for (run in n) printf "| %s | %d | %.1e | %s | %d |\n", run, n[run], most[run], of[run], alike[run] }' | sort -r
  echo
  draw_losses deep_loss "Keel, and MV-Split (beta 0.01, lr 7e-4 unless named), cut off at step 150"
  draw_modes deep_modes depth keel
  echo "![samples of 10,000 layers]($figures/deep_keel.png)"
  echo
}
