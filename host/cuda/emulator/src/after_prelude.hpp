// Conversions that the prelude leaves to the device's instructions.
DEVICE float widen(f16 v) {
    _Float16 half;
    memcpy(&half, &v.bits, 2);
    return (float)half;
}
DEVICE void narrow(float v, f16 &out) {
    _Float16 half = (_Float16)v;
    memcpy(&out.bits, &half, 2);
}
DEVICE void narrow(float v, bf16 &out) {
    u32 bits = __float_as_uint(v);
    out.bits = v != v ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
