// Vercel's ai package, unmodified, over the Responses API, chat completions and Anthropic's messages.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, apiKey] = process.argv.slice(2);
const models = [
  createOpenAI({ baseURL, apiKey }).responses("policy"),
  createOpenAICompatible({ name: "gateway", baseURL, apiKey }).chatModel("policy"),
  createAnthropic({ baseURL, apiKey })("policy"),
];
const add = tool({
  description: "Adds.",
  inputSchema: z.object({ a: z.literal(2), b: z.literal(3), exact: z.boolean().default(true) }),
  execute: async ({ a, b }) => ({ sum: a + b }),
});
for (const model of models) {
  const result = streamText({
    model,
    system: "Add with the tool, then say the sum.",
    prompt: "What is 2 + 3?",
    tools: { add },
    maxOutputTokens: 256,
    // One call per answer: a random model would go on calling.
    providerOptions: {
      openai: { parallelToolCalls: false },
      gateway: { parallel_tool_calls: false },
      anthropic: { disableParallelToolUse: true },
    },
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    onError: ({ error }) => {
      throw error;
    },
  });
  await result.consumeStream();
  const steps = await result.steps;
  if (steps.length !== 2 || steps[0].toolResults[0].output.sum !== 5) throw new Error(JSON.stringify(steps));
  console.log(JSON.stringify(await result.text));
}
process.exit(0); // the connections would be kept for a while
