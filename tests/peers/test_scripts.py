"""What the scripts beside this file compute, without a GPU and without torch: python3 -m unittest discover -s tests/peers"""
import copy
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu
import sass


def pages(what: str = "kernels") -> dict:
    return copy.deepcopy(gpu.made_up(what))


def target(name: str, at: str) -> gpu.Target:
    return next(t for t in gpu.kernel_targets() + gpu.step_targets() if (t.name, t.at) == (name, at))


class Ratios(unittest.TestCase):
    def test_a_block_is_the_sum_of_its_groups_with_the_fastest_kernel_of_each(self):
        page = pages()
        slow = [r for r in page["kernels"] if r["operation"] == "linear" and r["tokens"] == 64]
        for row in slow:
            page["kernels"].append(row | {"kernel": "gemm_nt_128x128", "seconds": gpu.made_up_seconds(0.25e-3)})
        ours = gpu.Ours(page)
        self.assertAlmostEqual(ours.block("linear", 64), 1e-3)
        # Those that dequantise first are faster, and do not count where a fused one is asked for.
        self.assertAlmostEqual(ours.block("linear", 64, fused=True), 4e-3)
        self.assertAlmostEqual(ours.block("linear", 64, fused=False), 1e-3)

    def test_a_group_that_is_missing_is_no_zero(self):
        page = pages()
        page["kernels"] = [r for r in page["kernels"] if not r["shape"].startswith("down")]
        with self.assertRaisesRegex(gpu.Absent, "linear, 64 tokens for down"):
            gpu.Ours(page).block("linear", 64)

    def test_the_cube_is_a_share_of_the_probe(self):
        page = pages("cube")
        page["kernels"].append(page["kernels"][0] | {"flops": 1.6e12, "kernel": "gemm_nt_64x64"})
        self.assertAlmostEqual(gpu.Ours(page).cube(), 0.8)
        # 4096 tokens of another group are another product.
        page["kernels"] = [r | {"shape": "down [4096×14336]·[4096]"} for r in page["kernels"]]
        with self.assertRaises(gpu.Absent):
            gpu.Ours(page).cube()

    def test_a_ratio_is_the_median_of_its_rounds(self):
        rounds = []
        for factor in (1.0, 4.0, 2.0):
            peer = copy.deepcopy(gpu.made_up_peer("kernels", 0))
            for row in peer["rows"]:
                # Four groups of a block, one of which has all the time.
                row["seconds"]["median"] = 4e-3 * factor
            rounds.append((gpu.Ours(pages()), gpu.Peer(peer)))
        found = gpu.judge(target("fused forward / dequantise + matmul", "M 64"), rounds)
        self.assertAlmostEqual(found.ratio, 2.0)
        self.assertAlmostEqual(found.least, 1.0)
        self.assertAlmostEqual(found.most, 4.0)
        self.assertEqual((found.verdict, round(found.ours), round(found.theirs)), ("first", 4000, 8000))

    def test_verdicts_know_which_way_is_better(self):
        time, share = target("product with LoRA / without, time", "M 512"), target("dequantise / own copy", "")
        self.assertEqual([gpu.verdict(time, r) for r in (1.06, 1.15, 1.16)], ["then", "first", "missed"])
        self.assertEqual([gpu.verdict(share, r) for r in (0.9, 0.75, 0.74)], ["then", "first", "missed"])

    def test_a_step_counts_its_update(self):
        ours = gpu.Ours(pages("step of 512 tokens"))
        self.assertAlmostEqual(ours.step_speed(512), 512.0)  # 0.9 s and 0.1 s
        line = next(s for s in ours.page["steps"] if s["tokens"] == 2048 and s["recompute"])
        line["not_measured"] = "it would take too much"
        peer = gpu.Peer(gpu.made_up_peer("step", 2048))
        found = gpu.judge(target("whole step / PEFT + bitsandbytes", "2048 tokens"), [(ours, peer)])
        self.assertIn("it would take too much", found.verdict)
        self.assertIsNone(found.ratio)

    def test_memory_is_theirs_at_its_smallest(self):
        ours, peer = gpu.Ours(pages("step of 2048 tokens")), gpu.Peer(gpu.made_up_peer("step", 2048))
        found = gpu.judge(target("peak memory / PEFT + bitsandbytes", "2048 tokens"), [(ours, peer)])
        self.assertEqual((found.ratio, found.verdict), (0.5, "first"))  # of what is allocated, not of what is reserved
        peer.page["memory"] = None
        self.assertIn("not measured", gpu.judge(target("peak memory / PEFT + bitsandbytes", "2048 tokens"), [(ours, peer)]).verdict)

    def test_without_a_peer_what_needs_none_is_judged(self):
        page = pages()
        page["kernels"] += pages("cube")["kernels"]
        rounds = [(gpu.Ours(page), gpu.Peer({}))]
        for one in gpu.kernel_targets() + gpu.step_targets():
            found = gpu.judge(one, rounds)
            self.assertEqual(found.ratio is not None, one.alone, one.name)


class Turns(unittest.TestCase):
    """With programs in the place of finetuned and of the peers' Python."""

    def run_turns(self, ours: str, peers: str, limit: float = 60.0):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            programs = []
            for name, text in (("finetuned", ours), ("python", peers)):
                file = work / name
                file.write_text(f"#!{sys.executable}\nimport json, sys\nsys.path.insert(0, {str(gpu.HERE)!r})\nimport gpu\n{text}\n")
                file.chmod(0o755)
                programs.append(file)
            options = SimpleNamespace(limit=limit, dry_run=False, peers=False, alone=False, cubins=None, rounds=1,
                                      what=["kernels", "step"], finetuned=programs[0], python=str(programs[1]))
            return gpu.measure(gpu.Runner(options, work))

    OURS = """what = 'cube' if '4096' in sys.argv else 'step' if 'step' in sys.argv else 'kernels'
print(json.dumps(gpu.made_up(what)))"""
    PEERS = """request = json.load(open(sys.argv[3]))
print(json.dumps(gpu.made_up_peer(sys.argv[2], request['tokens'])))"""

    def test_everything_is_judged(self):
        results, raw, problems = self.run_turns(self.OURS, self.PEERS)
        self.assertEqual(problems, [])
        self.assertEqual([r.name for r in results if r.ratio is None], [])
        self.assertEqual((len(raw["kernels"]), sorted(raw["steps"])), (1, sorted(gpu.STEP_TOKENS)))

    def test_what_fails_is_said_and_the_rest_is_judged(self):
        results, _, problems = self.run_turns(self.OURS, "sys.exit('no kernel image')")
        self.assertEqual(len(problems), 1 + len(gpu.STEP_TOKENS))
        self.assertIn("no kernel image", problems[0])
        self.assertEqual({r.ratio is not None for r in results if r.name == "dequantise / own copy"}, {True})
        self.assertEqual({r.ratio for r in results if r.name.startswith("whole step")}, {None})

    def test_another_device_and_the_stand_in_are_no_comparison(self):
        _, _, problems = self.run_turns(self.OURS, self.PEERS.replace("print(json.dumps(", "print(json.dumps({'device': 'other'} and ")
                                        .replace("['tokens'])", "['tokens']) | {'device': 'other'}"))
        self.assertIn("on made up and the peers on other", problems[0])
        _, _, problems = self.run_turns(self.OURS.replace("(what)", "(what) | {'stand_in': 'stand-in: not a speed'}"), self.PEERS)
        self.assertIn("stand-in", problems[0])

    def test_time_is_limited(self):
        _, _, problems = self.run_turns("import time; time.sleep(60)", self.PEERS, limit=1.5)
        self.assertIn("not done in the", problems[0])
        self.assertIn("out of time", problems[-1])


LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   DEPBAR.LE SB0, 0x1 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64], !P1 ;
.L_x_2:
        /*0050*/               @P2 BRA `(.L_x_3) ;
        /*0060*/                   FADD R3, R3, R4 ;
        /*0070*/                   IADD3 R3, R3, R4, RZ ;
.L_x_3:
        /*0080*/                   LDSM.16.M88.4 R4, [R9] ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*00b0*/               @P0 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""


class Listings(unittest.TestCase):
    def test_a_trip_is_counted(self):
        kernel = sass.Kernel("kernel", "kernel.cu", threads=256, dynamic_shared=0, registers=128)
        loop = sass.look(kernel, *sass.functions(LISTING)["kernel"])
        # With the copy, without the sum that can be jumped over.
        self.assertEqual((loop.instructions, loop.in_all), (9, 11))
        self.assertEqual({k: loop.mix[k] for k in ("hmma", "ldsm", "ldgsts", "control")},
                         {"hmma": 2, "ldsm": 1, "ldgsts": 1, "control": 5})
        self.assertEqual((loop.shared_bytes, loop.async_bytes), (1024, 512))
        # 8 warps: 4 of 2,048 FMA each at 1,024; 9 slots of 4; 8 KiB at 128 bytes.
        self.assertEqual((loop.clocks["tensor"], loop.clocks["issue"], loop.clocks["shared"]), (32.0, 18.0, 64.0))
        self.assertEqual((loop.binding, loop.ceiling), ("shared", 0.5))
        self.assertEqual(sass.in_flight(kernel, loop), 2 * 512 * 8)
        self.assertEqual(kernel.blocks_sm87(), 2)

    def test_classes_and_widths(self):
        self.assertEqual([sass.class_of(n) for n in ("HMMA", "UIADD3", "LOP3", "IMAD", "MUFU")],
                         ["hmma", "uniform", "alu", "imad", "mufu"])
        widths = {"LDS.128": 512, "LDS.64": 256, "LDS": 128, "LDS.U8": 32, "LDSM.16.MT88.4": 512, "LDSM.16.M88": 128}
        for mnemonic, size in widths.items():
            self.assertEqual(sass.Instruction(0, "", mnemonic, "").bytes(), size, mnemonic)

    def test_the_lists_of_the_crate_can_be_read(self):
        kernels = sass.table(sass.REPOSITORY / "cuda/kernels")
        source = (sass.REPOSITORY / "cuda/src/source.rs").read_text()
        self.assertEqual({k.file for k in kernels}, set(sass.quoted(source, "FILES")))
        self.assertIn("--fmad=false", sass.quoted(source, "OPTIONS"))
        self.assertEqual([h for h in sass.quoted(source, "HEADERS") if not h.endswith(".cuh")], [])


if __name__ == "__main__":
    unittest.main()
