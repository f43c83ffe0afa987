/**
 * Checks the script of the page like any other: format, lint and types. Run by `deno task check`.
 *
 * @module
 */

const root = new URL("../", import.meta.url);
const page = await Deno.readTextFile(new URL("index.html", root));
const script = page.match(/\n( *)<script type="module">\n([^]*?)\n *<\/script>/);
if (!script) throw new Error("index.html has no script");

const folder = await Deno.makeTempDir();
try {
  // In the page it is indented as far as its element.
  const source = script[2].replaceAll(`\n${script[1]}`, "\n").slice(script[1].length);
  await Deno.writeTextFile(`${folder}/page.js`, `${source}\n`);
  await Deno.copyFile(new URL(".ci/page.d.ts", root), `${folder}/page.d.ts`);
  const { fmt } = JSON.parse(await Deno.readTextFile(new URL("deno.json", root)));
  // Whatever has no type may be anything: the page stays small.
  const compilerOptions = {
    lib: ["dom", "dom.iterable", "dom.asynciterable", "esnext"],
    types: ["./page.d.ts"],
    noImplicitAny: false,
    strictNullChecks: false,
  };
  await Deno.writeTextFile(`${folder}/deno.json`, JSON.stringify({ fmt, compilerOptions }));
  for (const args of [["fmt", "--check"], ["lint", "--quiet"], ["check", "--quiet"]]) {
    const deno = new Deno.Command(Deno.execPath(), { args: [...args, "page.js"], cwd: folder });
    const { code } = await deno.spawn().status;
    if (code) Deno.exitCode = code;
  }
} finally {
  await Deno.remove(folder, { recursive: true });
}
