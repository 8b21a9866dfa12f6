// Two ways to hand shared memory from one role's 64 threads to another's 64 threads. HAND=1: bar.sync of the writers, then one arrives
// on the mbarrier the readers wait for. HAND=2: every writer arrives. HAND=3: as 1 without the bar.sync (a real race).
#include <cstdio>
#include <cstdint>
#ifndef HAND
#define HAND 1
#endif
__device__ inline uint32_t s(const void* p){ return (uint32_t)__cvta_generic_to_shared(p); }
__global__ void k(int* out){
  __shared__ int box[64]; __shared__ __align__(8) uint64_t ready;
  if(threadIdx.x==0) asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"::"r"(s(&ready)),"r"(HAND==2?64:1):"memory");
  __syncthreads();
  if(threadIdx.x<64){
    box[threadIdx.x]=threadIdx.x*3;
    if(HAND==1) asm volatile("bar.sync 3, 64;":::"memory");
    if(HAND==2 || threadIdx.x==0) asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0];}"::"r"(s(&ready)):"memory");
  } else {
    asm volatile("{.reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @p bra D; bra W; D: }"::"r"(s(&ready)):"memory");
    out[threadIdx.x-64]=box[127-threadIdx.x];
  }
}
int main(){ int*o; cudaMalloc(&o,256); k<<<1,128>>>(o); int h[64]; cudaMemcpy(h,o,256,cudaMemcpyDeviceToHost); printf("HAND %d ok %d\n",HAND,h[0]==189); }
