//! The host's side of an actor: from a call's name and bytes to the method, and what it returns back to
//! bytes.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Result, Type};

use crate::method::{Method, Output, Purpose};
use crate::options::Options;

/// What runs a method, and the hooks, of an actor in its host.
pub(super) fn write_dispatch(
    actor: &Type,
    methods: &[Method],
    options: &Options,
) -> Result<TokenStream> {
    let calls = methods.iter().filter(|m| m.purpose == Purpose::Call);
    let hooks = methods.iter().filter_map(write_hook);
    let (shared, exclusive): (Vec<&Method>, Vec<&Method>) =
        calls.partition(|method| options.is_concurrent() && !method.is_exclusive);
    let exclusive = write_match(actor, &exclusive);
    let concurrent = options.is_concurrent().then(|| {
        let shared = write_match(actor, &shared);
        quote! {
            impl ::mobula::__private::ConcurrentActor for #actor {
                #[allow(unused_variables, clippy::let_unit_value)]
                fn dispatch_shared<'a>(
                    &'a self,
                    call: ::mobula::__private::MethodCall<'a>,
                ) -> ::mobula::__private::Dispatching<'a> {
                    #shared
                }
            }
        }
    });
    Ok(quote! {
        impl ::mobula::__private::DynActor for #actor {
            #[allow(unused_variables, clippy::let_unit_value)]
            fn dispatch<'a>(
                &'a mut self,
                call: ::mobula::__private::MethodCall<'a>,
            ) -> ::mobula::__private::Dispatching<'a> {
                #exclusive
            }

            #(#hooks)*
        }

        #concurrent
    })
}

/// Finds the method by its name, and runs it.
fn write_match(actor: &Type, methods: &[&Method]) -> TokenStream {
    let arms = methods.iter().map(|method| write_arm(method));
    quote! {
        let ::mobula::__private::MethodCall { method, arguments, context, items, .. } = call;
        ::std::boxed::Box::pin(async move {
            match method {
                #(#arms)*
                unknown => ::core::result::Result::Err(
                    ::mobula::__private::unknown_method::<#actor>(unknown),
                ),
            }
        })
    }
}

fn write_arm(method: &Method) -> TokenStream {
    let Method {
        name, arguments, ..
    } = method;
    let text = name.to_string();
    let names: Vec<_> = arguments.iter().map(|(name, _)| name).collect();
    let types = arguments.iter().map(|(_, argument)| argument);
    let context = method.takes_context.then(|| quote!(context,));
    let wait = method.is_async.then(|| quote!(.await));
    let call = quote!(self.#name(#context #(#names),*) #wait);
    let call = match method.blocks {
        true => quote!(::mobula::run_blocking(|| #call)),
        false => call,
    };
    let encode = match method.output {
        Output::Value(_) => quote!(::mobula::__private::value(#text, &returned)),
        Output::Fallible(..) => quote!(::mobula::__private::outcome(#text, &returned)),
        Output::Items(_) => quote!(::mobula::__private::send_items(#text, returned, items).await),
    };
    quote! {
        #text => {
            let (#(#names,)*): (#(#types,)*) =
                ::mobula::__private::arguments(#text, arguments)?;
            let returned = #call;
            #encode
        }
    }
}

fn write_hook(method: &Method) -> Option<TokenStream> {
    let name = &method.name;
    let context = method.takes_context.then(|| quote!(context,));
    let wait = method.is_async.then(|| quote!(.await));
    let (hook, parameter, argument) = match method.purpose {
        Purpose::Started => (quote!(started), None, None),
        Purpose::Stop => (quote!(on_stop), None, None),
        Purpose::Notice => (
            quote!(on_notice),
            Some(quote!(deadline_ms: u64,)),
            Some(quote!(deadline_ms)),
        ),
        _ => return None,
    };
    Some(quote! {
        #[allow(unused_variables)]
        fn #hook<'a>(
            &'a mut self,
            #parameter
            context: &'a ::mobula::ActorContext,
        ) -> ::mobula::__private::Hook<'a> {
            ::std::boxed::Box::pin(async move { self.#name(#context #argument) #wait })
        }
    })
}
