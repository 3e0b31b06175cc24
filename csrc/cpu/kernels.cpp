// Compiled once for each instruction set, with R1_INSTRUCTIONS naming the table.
#include "kernels.h"

#include "attention.h"
#include "decode.h"
#include "moe.h"
#include "norm.h"

namespace r1::cpu {

const Kernels R1_INSTRUCTIONS = {
    rms_norm,        rms_norm_backward, apply_rope,         route,     route_backward,
    sort_by_expert,  experts_forward,   experts_backward,   sum_pairs, swiglu,
    swiglu_backward, attention,         attention_backward, decode,    append,
};

}  // namespace r1::cpu
